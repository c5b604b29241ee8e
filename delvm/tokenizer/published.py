"""Published checkpoints -> the tokenizer users hold.

    tokenizer = load("vqgan-f16-8192-laion")     # open-muse: the tokenizer of DeLVM and LVM
    tokenizer = load("vq_ds16_c2i.pt")           # LlamaGen

| what | read from | its network reads |
|---|---|---|
| this project's own | folder with delvm_tokenizer.json | as the file says |
| diffusers.VQModel | folder with config.json | -1..1; 0..1 in aMUSEd's pipeline |
| open-muse VQGANModel | folder with config.json | 0..1 |
| taming-transformers (Esser et al., CVPR 2021) | .ckpt, sizes checked against a .yaml beside it | -1..1 |
| LlamaGen VQ-8, VQ-16 (Sun et al., 2024) | .pt | -1..1 |

All become a diffusers.VQModel with equal codes; encode and decode of every one take and give 0..1. Sizes are
read off the tensors. What diffusers.VQModel cannot compute is refused.
"""

import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import VQModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from delvm.errors import UserError
from delvm.tokenizer.vqgan import MODEL_CONFIG, WEIGHTS, WRAPPER_CONFIG, Tokenizer, one_line, read_json

IMAGE_SIZE = 256  # pixels: what these tokenizers were trained on, where no file beside one says otherwise
SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
NAMES = (WEIGHTS, "model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")
"""The weights of a folder, the first that is there; with none of them, its only file of SUFFIXES."""

NESTED = ("ema", "model", "state_dict")
"""Under which key a checkpoint has its tensors, the first that is there."""

FOREIGN = ("argparse.Namespace", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")
"""Classes that checkpoints name beside their tensors; never imported, Ignored stands in for them."""

LEFT_OUT = r"loss\.|model_ema\.|quantize\.codebook_used$"
"""Tensors of the training: discriminator and perceptual network, averages, how often codes were used."""

MASKGIT = "MaskGitVQGAN pads and pools otherwise"
MOVQ = "its normalisation reads the codes (MoVQ)"
RESAMPLED = "it halves and doubles the side without a convolution (resample_with_conv: false)"
REFUSED = {
    r"quantize\.(proj|embed)\.": "a Gumbel quantizer takes the largest logit, not the nearest code",
    r"quantize\.used$": "its codes are renumbered",
    r".*\.upsample_conv\.": MASKGIT,
    r".*\.norm_layer\.": MOVQ,
    r".*\.extra_mid_res_blocks\.": "the decoder's middle has extra residual blocks",
    r".*\.temb_proj\.": "its residual blocks read a time step",
    r".*\.conv_shortcut\.": "its shortcuts are 3 x 3 convolutions",
    r".*\.running_mean$": "it has batch normalisation",
}
"""Names of tensors outside diffusers -> why a network that has one is no diffusers.VQModel."""

RENAMED = (
    (r"^encoder\.(?:down|conv_blocks)\.", "encoder.down_blocks."),
    (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),  # the coarsest first, as in diffusers
    (r"\.mid\.(?:block_1|0)\.", ".mid_block.resnets.0."),
    (r"\.mid\.(?:attn_1|1)\.", ".mid_block.attentions.0."),
    (r"\.mid\.(?:block_2|2)\.", ".mid_block.resnets.1."),
    (r"_blocks\.(\d+)\.(?:block|res)\.", r"_blocks.\1.resnets."),
    (r"_blocks\.(\d+)\.attn\.", r"_blocks.\1.attentions."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.(?:q|query)\.", r"\1.to_q."),
    (r"(\.attentions\.\d+)\.(?:k|key)\.", r"\1.to_k."),
    (r"(\.attentions\.\d+)\.(?:v|value)\.", r"\1.to_v."),
    (r"(\.attentions\.\d+)\.(?:proj_out|proj_attn)\.", r"\1.to_out.0."),
)
"""Names of open-muse, taming, LlamaGen and diffusers of 2022 -> those of diffusers, one after the other."""

TAMING = {
    "num_channels": "in_channels",
    "hidden_channels": "ch",
    "channel_mult": "ch_mult",
    "num_res_blocks": "num_res_blocks",
    "z_channels": "z_channels",
    "num_embeddings": "n_embed",
    "quantized_embed_dim": "embed_dim",
}
"""Sizes by open-muse's names -> by taming's."""


def load(
    path: str | Path, *, image_size: int | None = None, pixel_range: Sequence[float] | None = None
) -> Tokenizer:
    """A tokenizer of any kind in the table above, in evaluation mode, on the CPU.

    Args:
        path: a folder, or a file of weights.
        image_size: side in pixels of the pictures that it is for, a multiple of its downsampling factor; the
            networks take any. Default: what a file beside the weights says, else 256. (Some diffusers.VQModel
            state 32, diffusers' default, whatever they were trained on.)
        pixel_range: what the network reads for 0..1. Default: the table's.

    Pickles are read without running anything in them.

    Raises:
        UserError: one line for what is missing or damaged, and for a network that is no diffusers.VQModel.
        ValueError: image_size or pixel_range are impossible.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such folder; a tokenizer is a folder with {MODEL_CONFIG} and weights, or a file"
            f" {', '.join(SUFFIXES)}"
        )
    if path.is_file() and path.name == WEIGHTS:
        path = path.parent  # what is beside it says more
    own = (path / WRAPPER_CONFIG).is_file()
    tokenizer = Tokenizer.load(path) if own else _load_published(_find_weights(path))
    if image_size is None and pixel_range is None:
        return tokenizer
    return Tokenizer(
        tokenizer.vqgan,
        tokenizer.patch,
        tokenizer.image_size if image_size is None else image_size,
        tokenizer.pixel_range if pixel_range is None else pixel_range,
        tokenizer.unit_codes,
    ).eval()


def _find_weights(path: Path) -> Path:
    if path.is_file():
        return path
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    # taming keeps its own in a folder of that name
    files = [file for folder in (path, path / "checkpoints") for file in _files(folder, SUFFIXES)]
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{path}: several files of weights; name one: {', '.join(map(str, files))}")
    raise UserError(f"{path}: holds no tokenizer: none of {', '.join(NAMES)}, no file {', '.join(SUFFIXES)}")


def _files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in suffixes and file.is_file())


def _load_published(file: Path) -> Tokenizer:
    state, nested = _read_tensors(file)
    layouts = {name.split(".")[1] for name in state if name.startswith("encoder.")}
    try:
        if "down_blocks" in layouts:
            return _from_diffusers(file, state)
        if "conv_blocks" in layouts:
            return _from_llamagen(file, state)
        if "down" in layouts and _has_open_muse_config(file):
            return _from_open_muse(file, state)
        if "down" in layouts and (nested == "state_dict" or _taming_config(file)):
            return _from_taming(file, state)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{file}: its settings describe no tokenizer: {one_line(error)}") from error
    if "down" in layouts:
        raise UserError(
            f"{file}: needs open-muse's {MODEL_CONFIG} or taming's .yaml beside it: which of the two it is"
            " decides what its network reads"
        )
    raise UserError(
        f"{file}: holds no tokenizer of diffusers, open-muse, taming-transformers or LlamaGen; its tensors:"
        f" {', '.join(sorted(state)[:3])}, ..."
    )


# -- the kinds -----------------------------------------------------------------------------------------------


def _from_diffusers(file: Path, state: dict[str, Tensor]) -> Tokenizer:
    if not (file.parent / MODEL_CONFIG).is_file():
        raise UserError(f"{file.parent}: no {MODEL_CONFIG}; a diffusers.VQModel is a folder with it")
    config = read_json(file.parent / MODEL_CONFIG)
    if config.get("_class_name", "VQModel") != "VQModel":
        raise UserError(f"{file.parent}: a {config['_class_name']} of diffusers; expected a VQModel")
    if config.get("norm_type", "group") != "group":
        raise _refusal(file, MOVQ)
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise UserError(
                f"{file.parent}: no {WRAPPER_CONFIG}; a tokenizer folder has one, or a network of 3 channels;"
                f" {key} is {config[key]}"
            )
    with torch.device("meta"):
        vqgan = VQModel.from_config(config)
    # its pipeline does not normalise, unlike all others of diffusers
    pipeline = file.parent.parent / "model_index.json"
    amused = pipeline.is_file() and str(read_json(pipeline).get("_class_name")).startswith("Amused")
    size = IMAGE_SIZE if amused else vqgan.config["sample_size"]
    return _filled(file, vqgan, _renamed(state), size, (0.0, 1.0) if amused else (-1.0, 1.0))


def _has_open_muse_config(file: Path) -> bool:
    """Whether the config beside it is open-muse's: another program's says nothing of the weights."""
    config_file = file.parent / MODEL_CONFIG
    config = read_json(config_file) if config_file.is_file() else {}
    return "_class_name" in config or {"hidden_channels", "num_embeddings"} <= config.keys()


def _from_open_muse(file: Path, state: dict[str, Tensor]) -> Tokenizer:
    config_file = file.parent / MODEL_CONFIG
    config = read_json(config_file)
    kind = config.get("_class_name", "VQGANModel")
    if kind != "VQGANModel":
        reason = MASKGIT if kind == "MaskGitVQGAN" else "expected open-muse's VQGANModel"
        raise UserError(f"{config_file}: a {kind}: {reason}")
    if config.get("resample_with_conv") is False:
        raise _refusal(file, RESAMPLED)
    state, sizes = _measured(file, state)
    if sizes["num_res_blocks"] == 1 and any(encoder for encoder, _ in sizes["attention"]):
        raise _refusal(file, "open-muse leaves out the encoder's attention where num_res_blocks is 1")
    _check_stated(config_file, config, sizes)
    return _filled(file, _network(sizes), state, config.get("resolution", IMAGE_SIZE), (0.0, 1.0))


def _from_taming(file: Path, state: dict[str, Tensor]) -> Tokenizer:
    state, sizes = _measured(file, state)
    size, config_file = IMAGE_SIZE, _taming_config(file)
    if config_file:
        settings = _taming_settings(config_file)
        if settings.get("resamp_with_conv") is False:
            raise _refusal(file, RESAMPLED)
        _check_stated(
            config_file, settings, {TAMING[key]: value for key, value in sizes.items() if key in TAMING}
        )
        size = settings.get("resolution", IMAGE_SIZE)
    return _filled(file, _network(sizes), state, size, (-1.0, 1.0))


def _from_llamagen(file: Path, state: dict[str, Tensor]) -> Tokenizer:
    state, sizes = _measured(file, state)
    # the nearest of unit vectors; with these rows plain diffusers finds the same codes
    state["quantize.embedding.weight"] = F.normalize(state["quantize.embedding.weight"].float(), dim=1)
    return _filled(file, _network(sizes), state, IMAGE_SIZE, (-1.0, 1.0), unit_codes=True)


# -- tensors -> network --------------------------------------------------------------------------------------


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under diffusers' names, 1 x 1 convolutions of attention as matrices."""
    levels = _count(r"decoder\.up\.(\d+)\.", state)
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(
            r"^decoder\.up\.(\d+)\.", lambda at: f"decoder.up_blocks.{levels - 1 - int(at[1])}.", name
        )
        for old, new in RENAMED:
            name = re.sub(old, new, name)
        renamed[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return renamed


def _measured(file: Path, published: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors under diffusers' names, and sizes under open-muse's.

    `attention`: for every level, the finest first, whether (encoder, decoder) attend there.
    """
    published = {name: tensor for name, tensor in published.items() if not re.match(LEFT_OUT, name)}
    for pattern, reason in REFUSED.items():
        if any(re.match(pattern, name) for name in published):
            raise _refusal(file, reason)
    state = _renamed(published)
    levels = _count(r"encoder\.down_blocks\.(\d+)\.", state)
    if levels > 1 and not any(".downsamplers." in name for name in state):
        raise _refusal(file, RESAMPLED)
    down = [f"encoder.down_blocks.{level}." for level in range(levels)]
    up = [f"decoder.up_blocks.{levels - 1 - level}." for level in range(levels)]
    try:
        widths, decoder_widths = (
            [len(state[block + "resnets.0.conv1.weight"]) for block in blocks] for blocks in (down, up)
        )
        hidden, num_channels = state["encoder.conv_in.weight"].shape[:2]
        num_embeddings, code_dim = state["quantize.embedding.weight"].shape
        z_channels = len(state["encoder.conv_out.weight"])
    except KeyError as error:
        raise UserError(f"{file}: no tensor {error}; not a whole VQ tokenizer") from error
    num_res_blocks = _count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", state)
    if (
        decoder_widths != widths
        or _count(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", state) != num_res_blocks + 1
    ):
        raise _refusal(file, "the decoder has other widths or numbers of residual blocks than the encoder")
    if widths[0] != hidden:
        raise _refusal(file, f"the finest level has {widths[0]} channels, the first convolution {hidden}")

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    return state, {
        "num_channels": num_channels,
        "hidden_channels": hidden,
        "channel_mult": [width // hidden for width in widths],
        "num_res_blocks": num_res_blocks,
        "z_channels": z_channels,
        "num_embeddings": num_embeddings,
        "quantized_embed_dim": code_dim,
        "no_attn_mid_block": not has("encoder.mid_block.attentions."),
        "attention": [
            (has(a + "attentions."), has(b + "attentions.")) for a, b in zip(down, up, strict=True)
        ],
    }


def _network(sizes: Mapping[str, Any]) -> VQModel:
    """Without memory for its weights."""
    with torch.device("meta"):
        return VQModel(
            in_channels=sizes["num_channels"],
            out_channels=sizes["num_channels"],
            down_block_types=tuple(
                "AttnDownEncoderBlock2D" if down else "DownEncoderBlock2D" for down, _ in sizes["attention"]
            ),
            up_block_types=tuple(
                "AttnUpDecoderBlock2D" if up else "UpDecoderBlock2D" for _, up in reversed(sizes["attention"])
            ),
            block_out_channels=tuple(sizes["hidden_channels"] * factor for factor in sizes["channel_mult"]),
            layers_per_block=sizes["num_res_blocks"],
            latent_channels=sizes["z_channels"],
            num_vq_embeddings=sizes["num_embeddings"],
            vq_embed_dim=sizes["quantized_embed_dim"],
            norm_num_groups=32,
            mid_block_add_attention=not sizes["no_attn_mid_block"],
            lookup_from_codebook=True,
        )


def _filled(
    file: Path,
    vqgan: VQModel,
    state: dict[str, Tensor],
    image_size: int,
    pixel_range: tuple[float, float],
    unit_codes: bool = False,
) -> Tokenizer:
    """The tokenizer with these weights, in float32. Raises UserError where they are not the network's."""
    expected = {name: tensor.shape for name, tensor in vqgan.state_dict().items()}
    misfits = {
        "missing": expected.keys() - state.keys(),
        "unknown": state.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & state if expected[name] != state[name].shape},
    }
    problems = [
        f"{len(names)} tensors {what} (first: {min(names)})" for what, names in misfits.items() if names
    ]
    if problems:
        raise _refusal(file, "; ".join(problems))
    weights = {name: state[name].detach().to(torch.float32, copy=True).contiguous() for name in expected}
    vqgan.load_state_dict(weights, assign=True)
    vqgan.register_to_config(sample_size=image_size)
    return Tokenizer(vqgan, 1, image_size, pixel_range, unit_codes).eval()


def _count(pattern: str, names: Iterable[str]) -> int:
    """One more than the largest number that `pattern` finds at the beginning of a name."""
    return 1 + max((int(at[1]) for name in names if (at := re.match(pattern, name))), default=-1)


def _check_stated(file: Path, config: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Refuse settings that are those of other weights."""
    for key, size in sizes.items():
        stated = config.get(key, size)
        if (list(stated) if isinstance(stated, list | tuple) else stated) != size:
            raise UserError(f"{file}: {key}: {stated}, the weights beside it have {size}")


def _refusal(file: Path, reason: str) -> UserError:
    return UserError(f"{file}: diffusers.VQModel cannot represent it: {reason}")


# -- files -> tensors and settings ---------------------------------------------------------------------------


class Ignored:
    """Stands for an object of a checkpoint that is no tensor."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], str]:
    """A file's tensors by name, and under which key of NESTED they were, "" for none."""
    content: Any = None
    try:
        if file.suffix == ".safetensors":
            return load_file(file), ""
        with torch.serialization.safe_globals([(Ignored, name) for name in FOREIGN]):
            # mapped into memory, an optimizer's state that is there too is never read
            content = torch.load(
                str(file), map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
            )
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise UserError(
                f"{file}: refused: its pickle asks for {foreign[1]}, which no tensor needs; nothing was run"
            ) from error
        raise UserError(f"{file}: unreadable weights: {one_line(error)}") from error
    nested = next((key for key in NESTED if isinstance(content, Mapping) and key in content), "")
    found = content[nested] if nested else content
    if not isinstance(found, Mapping):
        raise UserError(f"{file}: holds no tensors by name")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}, nested


def _taming_config(file: Path) -> Path | None:
    """The .yaml of a checkpoint: of its name, or the only one beside it or in ../configs."""
    for folder in (file.parent, file.parent.parent / "configs"):
        files = _files(folder, (".yaml", ".yml"))
        own = [config for config in files if config.stem == file.stem]
        if own or len(files) == 1:
            return (own or files)[0]
    return None


def _taming_settings(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        params = content["model"]["params"]
        return {**params["ddconfig"], "n_embed": params["n_embed"], "embed_dim": params["embed_dim"]}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not the settings of a taming-transformers VQGAN: {one_line(error)}"
        ) from error
