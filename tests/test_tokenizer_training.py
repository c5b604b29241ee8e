import copy
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from delvm.errors import UserError
from delvm.tokenizer.training import (
    TokenizerConfig,
    TokenizerTraining,
    build,
    check,
    measure,
    num_parameters,
    patch_frequencies,
    perplexity,
    psnr,
    to_pictures,
)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_config(**changes):
    settings = {
        "num_codes": 32,
        "code_dim": 8,
        "channels": 32,
        "steps": 40,
        "batch_size": 16,
        "warmup_steps": 2,
    }
    return TokenizerConfig(**{**settings, **changes})


def pairs(num=48, size=16, seed=0):
    """(gradients with a square, the square's mask), uint8 (num, 2, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(num, 3, 2, 2, generator=generator)
    images = torch.nn.functional.interpolate(corners, size=size, mode="bilinear", align_corners=True)
    masks = torch.zeros_like(images)
    for index in range(num):
        top, left = torch.randint(0, size - 6, (2,), generator=generator).tolist()
        colour = torch.randint(0, 2, (3, 1, 1), generator=generator).float()
        masks[index, :, top : top + 6, left : left + 6] = colour
        images[index, :, top : top + 6, left : left + 6] = 1 - colour
    both = torch.stack([images, masks], dim=1)
    return (both * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def run(module, batches, optimizer=None, scheduler=None):
    if optimizer is None:
        made = module.configure_optimizers()
        optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    losses = []
    for batch in batches:
        values = module.training_step(batch)
        optimizer.zero_grad()
        values["loss"].backward()
        optimizer.step()
        scheduler.step()
        losses.append(values["loss"].item())
    return losses, optimizer, scheduler


def batches_of(data, steps, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [data[torch.randint(len(data), (size,), generator=generator)] for _ in range(steps)]


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    config = tiny_config()
    module = TokenizerTraining(config, 16)
    data = pairs()
    start = copy.deepcopy(module)
    run(module, batches_of(data, config.steps, 8))
    return config, start, module, data


def test_training_raises_psnr_and_uses_codes(trained):
    config, start, module, data = trained
    before = copy.deepcopy(start)
    run(before, batches_of(data, 1, 8))
    before = measure(before.finish(), data.split(16))
    after = measure(copy.deepcopy(module).finish(), data.split(16))
    assert after["psnr"] > before["psnr"] + 1.5
    assert after["psnr"] > 15
    assert after["codes_used"] >= 0.8 * config.num_codes
    assert 8 < after["codebook_perplexity"] <= after["codes_used"]


def test_finish_gives_the_quantizers_ids(trained):
    _, _, module, data = trained
    module = copy.deepcopy(module).eval()
    pictures = to_pictures(data)
    with torch.no_grad():
        _, ids, _ = module.quantizer(module.tokenizer.to_latents(pictures))
    tokenizer = module.finish()
    assert not tokenizer.training
    assert torch.equal(tokenizer.encode(pictures), ids.flatten(1))


@pytest.mark.parametrize("after", [0, 5])
def test_a_state_dict_is_all_of_the_training(after):
    data = pairs()
    config = tiny_config(restart_below=4.0)
    torch.manual_seed(3)
    one = TokenizerTraining(config, 16)
    _, optimizer, scheduler = run(one, batches_of(data, after, 8))
    torch.manual_seed(11)
    other = TokenizerTraining(config, 16)
    made = other.configure_optimizers()
    other.load_state_dict(one.state_dict())
    made["optimizer"].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    made["lr_scheduler"]["scheduler"].load_state_dict(scheduler.state_dict())
    rest = batches_of(data, 4, 8, seed=1)
    expected, _, _ = run(one, rest, optimizer, scheduler)
    torch.manual_seed(99)  # the global state must not matter
    losses, _, _ = run(other, rest, made["optimizer"], made["lr_scheduler"]["scheduler"])
    assert losses == expected
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_step_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    module = TokenizerTraining(tiny_config(), 16)
    state = torch.get_rng_state()
    module.training_step(pairs(8))
    assert torch.equal(state, torch.get_rng_state())


def test_the_seed_decides():
    losses = []
    for seed in (0, 0, 1):
        pl.seed_everything(seed, verbose=False)
        losses.append(run(TokenizerTraining(tiny_config(), 16), batches_of(pairs(), 3, 8))[0])
    assert losses[0] == losses[1] != losses[2]


def test_pairs_and_pictures_are_alike():
    torch.manual_seed(0)
    one = TokenizerTraining(tiny_config(), 16)
    other = copy.deepcopy(one)
    data = pairs(8)
    assert one.training_step(data)["loss"].item() == other.training_step(data.flatten(0, 1))["loss"].item()


def test_lightning_runs_it(tmp_path):
    pl.seed_everything(0, verbose=False)
    module = TokenizerTraining(tiny_config(steps=6), 16)
    assert module.num_steps == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=6, max_epochs=-1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(module, DataLoader(pairs(), batch_size=8))
    assert int(module.steps_done) == 6
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01 * module.config.learning_rate)
    assert module.tokenizer.codebook.grad is None


def test_rate_warms_up_and_falls():
    module = TokenizerTraining(tiny_config(steps=20, warmup_steps=4, learning_rate=1.0), 16)
    rates = [module._rate(step) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(0.01)


def test_finish_refuses_a_diverged_training(trained):
    module = copy.deepcopy(trained[2])
    with torch.no_grad():
        module.tokenizer.vqgan.quant_conv.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"learning_rate: training diverged at 0\.001"):
        module.finish()


def test_linear_start_keeps_pictures():
    torch.manual_seed(0)
    tokenizer = build(TokenizerConfig(), 32)
    pictures = to_pictures(pairs(16, 32))
    with torch.no_grad():
        kept = tokenizer.from_latents(tokenizer.to_latents(pictures))
    assert psnr(kept, pictures).mean() > 18
    # with more levels the start is random, and the sizes still fit
    assert build(TokenizerConfig(channel_multipliers=[1, 2], channels=32), 32).grid == (4, 4)
    # fewer channels or pixels than latents
    assert build(TokenizerConfig(patch=1, channels=32, code_dim=64), 8).grid == (8, 8)


def test_patch_frequencies():
    rows = patch_frequencies(4, 16)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), atol=1e-6, rtol=0)
    torch.testing.assert_close(rows[0], torch.full((48,), 48**-0.5))


def test_to_pictures():
    batch = torch.arange(2 * 2 * 4 * 4 * 3).remainder(256).to(torch.uint8).view(2, 2, 4, 4, 3)
    pictures = to_pictures(batch)
    assert pictures.shape == (4, 3, 4, 4)
    assert pictures[1, 2, 3, 0].item() == pytest.approx(batch[0, 1, 3, 0, 2].item() / 255)
    for wrong in (batch.float(), batch[0, 0], batch.permute(0, 1, 4, 2, 3)):
        with pytest.raises(ValueError, match=r"pictures: .* must be torch\.uint8 \(batch, H, W, 3\)"):
            to_pictures(wrong)


def test_psnr_and_perplexity():
    black = torch.zeros(2, 3, 4, 4)
    off = black.clone()
    off[1] += 0.1
    assert psnr(off, black).tolist() == pytest.approx([60.0, 20.0], abs=1e-4)
    assert perplexity(torch.tensor([5, 5, 5, 5])).item() == pytest.approx(4.0)
    assert perplexity(torch.tensor([9, 0, 0, 0])).item() == pytest.approx(1.0)


def test_measure():
    torch.manual_seed(0)
    tokenizer = build(tiny_config(), 16)
    with torch.no_grad():
        tokenizer.codebook.zero_()  # every picture becomes the first code
    metrics = measure(tokenizer, [pairs(4), pairs(2)])
    assert (metrics["codes_used"], metrics["codebook_perplexity"]) == (1, pytest.approx(1.0))
    pictures = to_pictures(torch.cat([pairs(4), pairs(2)]))
    assert metrics["psnr"] == pytest.approx(psnr(tokenizer(pictures), pictures).mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="pictures: none"):
        measure(tokenizer, [])
    with pytest.raises(
        UserError, match=r"collapsed: 1 of 32 codes in use, min_codes_used 0\.5 asks for 16; more steps"
    ):
        check(metrics, tiny_config())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"psnr": 30.0, "codes_used": 15}, "15 of 32 codes"),
        ({"psnr": 17.94, "codes_used": 32}, r"PSNR 17\.9 dB, min_psnr asks for 18 dB; more steps"),
        ({"psnr": float("nan"), "codes_used": 32}, "PSNR nan"),
    ],
)
def test_check_refuses(metrics, message):
    with pytest.raises(UserError, match=message) as raised:
        check(metrics, tiny_config(min_psnr=18.0))
    assert "\n" not in str(raised.value)


def test_check_passes():
    check({"psnr": 18.0, "codes_used": 16, "codebook_perplexity": 9.0}, tiny_config(min_psnr=18.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_codes", 1), ("code_dim", 0), ("patch", 0), ("channels", 48), ("channels", 0), ("layers", 0),
        ("channel_multipliers", []), ("channel_multipliers", [1, 0]), ("steps", 0), ("batch_size", 1),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("warmup_steps", -1), ("commitment", -0.1),
        ("decay", 1.0), ("decay", -0.1), ("restart_below", -1.0), ("min_codes_used", 1.1),
        ("min_codes_used", -0.1), ("min_psnr", 60.0), ("min_psnr", -1.0),
    ],
)  # fmt: skip
def test_impossible_settings(key, value):
    with pytest.raises(ValueError, match=f"^{key}: .*must be"):
        TokenizerConfig(**{key: value})


def test_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match="image_size: 30, must be a positive multiple of 4"):
        build(TokenizerConfig(), 30)


def test_parameters_are_those_of_the_built_tokenizer():
    config = tiny_config()
    expected = sum(parameter.numel() for parameter in build(config, 16).parameters())
    assert num_parameters(config, 16) == expected > 100_000
