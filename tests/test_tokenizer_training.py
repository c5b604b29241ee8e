import copy
import signal
import warnings

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.models.vgg import cfgs, make_layers

from delvm.errors import UserError
from delvm.tokenizer import training
from delvm.tokenizer.adversarial import AdversarialConfig, adversarial_loss, discriminator_loss
from delvm.tokenizer.measures import psnr, ssim
from delvm.tokenizer.quantizers import QUANTIZERS
from delvm.tokenizer.training import (
    TokenizerConfig,
    TokenizerTraining,
    build,
    check,
    measure,
    num_parameters,
    to_pictures,
)
from delvm.tokenizer.vqgan import Tokenizer
from delvm.training import Interrupted, Shuffled, TrainerConfig, train
from tests.processes import together
from tests.trainings import assert_equal, send, weights_of

JUDGED = {"adversarial": AdversarialConfig(weight=0.5, start=2, channels=32, layers=1, learning_rate=2e-3)}


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


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_leaves_a_plain_tokenizer(name, tmp_path):
    torch.manual_seed(0)
    module = TokenizerTraining(tiny_config(quantizer=name, channel_multipliers=[1, 1], patch=2), 16)
    run(module, batches_of(pairs(), 4, 8))
    module.eval()
    pictures = to_pictures(pairs(seed=1))
    with torch.no_grad():
        codes, ids, _ = module.quantizer(module.tokenizer.to_latents(pictures))
        expected = module.tokenizer.from_latents(codes).clamp(0, 1)
    module.finish().save(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.unit_codes
    found = tokenizer.encode(pictures)
    assert torch.equal(found, ids.flatten(1))
    torch.testing.assert_close(tokenizer.decode(found), expected, atol=1e-5, rtol=0)


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


def test_to_pictures():
    batch = torch.arange(2 * 2 * 4 * 4 * 3).remainder(256).to(torch.uint8).view(2, 2, 4, 4, 3)
    pictures = to_pictures(batch)
    assert pictures.shape == (4, 3, 4, 4)
    assert pictures[1, 2, 3, 0].item() == pytest.approx(batch[0, 1, 3, 0, 2].item() / 255)
    for wrong in (batch.float(), batch[0, 0], batch.permute(0, 1, 4, 2, 3)):
        with pytest.raises(ValueError, match=r"pictures: .* must be torch\.uint8 \(batch, H, W, 3\)"):
            to_pictures(wrong)


def test_measure():
    torch.manual_seed(0)
    tokenizer = build(tiny_config(), 16)
    with torch.no_grad():
        tokenizer.codebook.zero_()  # every picture becomes the first code
    metrics = measure(tokenizer, [pairs(4), pairs(2)])
    assert (metrics["codes_used"], metrics["codebook_perplexity"]) == (1, pytest.approx(1.0))
    pictures = to_pictures(torch.cat([pairs(4), pairs(2)]))
    assert metrics["psnr"] == pytest.approx(psnr(tokenizer(pictures), pictures).mean().item(), abs=1e-4)
    assert metrics["ssim"] == pytest.approx(ssim(tokenizer(pictures), pictures).mean().item(), abs=1e-4)
    with pytest.raises(ValueError, match="pictures: none"):
        measure(tokenizer, [])
    with pytest.raises(
        UserError,
        match=r"collapsed: 1 of 32 codes in use by 192 tokens, min_codes_used 0\.5 asks for 16; more",
    ):
        check(metrics, tiny_config())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"psnr": 30.0, "codes_used": 15, "tokens": 9999}, "15 of 32 codes in use by 9,999 tokens"),
        # 32 tokens show 20.4 of 32 codes where all are as likely
        ({"psnr": 30.0, "codes_used": 10, "tokens": 32}, r"0\.5 asks for 11;"),
        (
            {"psnr": 17.94, "codes_used": 32, "tokens": 9999},
            r"PSNR 17\.9 dB, min_psnr asks for 18 dB; more steps",
        ),
        ({"psnr": float("nan"), "codes_used": 32, "tokens": 9999}, "PSNR nan"),
    ],
)
def test_check_refuses(metrics, message):
    with pytest.raises(UserError, match=message) as raised:
        check(metrics, tiny_config(min_psnr=18.0))
    assert "\n" not in str(raised.value)


def test_check_passes():
    check({"psnr": 18.0, "codes_used": 16, "tokens": 9999}, tiny_config(min_psnr=18.0))
    check({"psnr": 18.0, "codes_used": 11, "tokens": 32}, tiny_config(min_psnr=18.0))
    # a run from before its tokens were counted
    check({"psnr": 18.0, "codes_used": 16}, tiny_config(min_psnr=18.0))
    with pytest.raises(UserError, match=r"15 of 32 codes in use, min_codes_used 0\.5 asks for 16;"):
        check({"psnr": 18.0, "codes_used": 15}, tiny_config(min_psnr=18.0))


def test_a_few_pictures_cannot_show_all_codes_of_a_large_codebook():
    config = tiny_config(num_codes=8192)
    tokens = 20 * 256  # of 20 photographs of 256 px
    drawn = np.random.default_rng(0).integers(8192, size=tokens)  # all codes as likely
    used = len(np.unique(drawn))
    assert used < 0.5 * 8192
    check({"psnr": 30.0, "codes_used": used, "tokens": tokens}, config)
    with pytest.raises(UserError, match=r"; a lower min_codes_used takes it as it is$"):
        check({"psnr": 30.0, "codes_used": used // 2 - 9, "tokens": tokens}, config)
    with pytest.raises(UserError, match=r"; a lower min_psnr takes it as it is$"):
        check({"psnr": 9.0, "codes_used": used, "tokens": tokens}, config)


def test_no_more_pictures_go_through_the_network_at_once_than_their_size_allows(monkeypatch):
    tokenizer = build(tiny_config(), 16)
    whole = measure(tokenizer, [pairs(4)])
    sizes = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda images: sizes.append(len(images)) or encode(images))
    monkeypatch.setattr(training, "PASS_PIXELS", 3 * 16**2)
    assert measure(tokenizer, [pairs(4)]) == pytest.approx(whole, rel=1e-5)
    assert sizes == [3, 3, 2]
    assert [training.pass_pictures(size) for size in (8, 16, 256)] == [12, 3, 1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_codes", 1), ("code_dim", 0), ("patch", 0), ("channels", 48), ("channels", 0), ("layers", 0),
        ("channel_multipliers", []), ("channel_multipliers", [1, 0]), ("steps", 0), ("batch_size", 1),
        ("learning_rate", 0.0), ("learning_rate", float("nan")), ("warmup_steps", -1), ("commitment", -0.1),
        ("decay", 1.0), ("decay", -0.1), ("restart_below", -1.0), ("min_codes_used", 1.1),
        ("min_codes_used", -0.1), ("min_psnr", 60.0), ("min_psnr", -1.0), ("absolute", -1.0),
        ("perceptual", -1.0), ("perceptual", float("nan")),
    ],
)  # fmt: skip
def test_impossible_settings(key, value):
    with pytest.raises(ValueError, match=f"^{key}: .*must be"):
        TokenizerConfig(**{key: value})


def test_choices():
    with pytest.raises(ValueError, match=r"^quantizer: 'vq' is unknown; choices: ema, rotation, cosine, "):
        TokenizerConfig(quantizer="vq")
    with pytest.raises(ValueError, match=r"^perceptual_weights: missing, must be torchvision's file vgg16-"):
        TokenizerConfig(perceptual=1.0)


def test_a_size_that_does_not_fit():
    with pytest.raises(ValueError, match="image_size: 30, must be a positive multiple of 4"):
        build(TokenizerConfig(), 30)
    judged = TokenizerConfig(adversarial=AdversarialConfig(weight=1.0, layers=3))
    assert build(judged, 24).grid == (6, 6)
    said = r"^tokenizer\.adversarial\.layers: 3 need pictures of 24 px, data\.image_size is 20$"
    with pytest.raises(UserError, match=said):
        build(judged, 20)
    with pytest.raises(UserError, match=r"^tokenizer\.perceptual: needs pictures of 16 px, .* is 12$"):
        build(TokenizerConfig(perceptual=1.0, perceptual_weights="vgg16.pth"), 12)


def test_parameters_are_those_of_the_built_tokenizer():
    config = tiny_config()
    expected = sum(parameter.numel() for parameter in build(config, 16).parameters())
    assert num_parameters(config, 16) == expected > 100_000


# --- losses beside the squared error


def test_the_error_is_the_sum_of_its_parts(tmp_path):
    torch.manual_seed(0)
    torch.save(make_layers(cfgs["D"]).state_dict(prefix="features."), tmp_path / "vgg16.pth")
    pictures = to_pictures(pairs(4))
    kept = (pictures + 0.1 * torch.randn(pictures.shape)).requires_grad_()
    found = {}
    for name, changes in {
        "squared": {}, "absolute": {"absolute": 3.0},
        "perceptual": {"perceptual": 5.0, "perceptual_weights": str(tmp_path / "vgg16.pth")},
    }.items():  # fmt: skip
        module = TokenizerTraining(tiny_config(**changes), 16)
        found[name] = module._error(kept, pictures).item()
        assert not any("perceptual" in key for key in module.state_dict())
    assert found["squared"] == pytest.approx(4 * F.mse_loss(kept, pictures).item())
    assert found["absolute"] - found["squared"] == pytest.approx(6 * F.l1_loss(kept, pictures).item())
    distance = module.perceptual(kept, pictures).mean().item()
    assert found["perceptual"] - found["squared"] == pytest.approx(5 * distance, rel=1e-4)
    assert distance > 0.01


def test_a_step_takes_all_of_the_error():
    losses = []
    for absolute in (0.0, 1.0):
        torch.manual_seed(0)
        module = TokenizerTraining(tiny_config(absolute=absolute), 16)
        losses.append(module.training_step(pairs(4))["loss"].item())
    assert losses[1] > losses[0] + 0.1


# --- with a discriminator


def trained_by_lightning(folder, steps=6, at=None, action=None, precision="32-true", **changes):
    """The module and its curve. Four pairs a step; reading item `at` does something as well."""

    class Pairs(Shuffled):
        def __getitem__(self, index):
            if index == at:
                action()
            return super().__getitem__(index)

    folder.mkdir(exist_ok=True)
    pl.seed_everything(0, verbose=False)
    module = TokenizerTraining(tiny_config(steps=steps, num_codes=16, **{**JUDGED, **changes}), 16)
    config = TrainerConfig(accelerator="cpu", log_every=2, diagnose_every=3, precision=precision)
    curve = train(
        module, Pairs(pairs(), 4 * steps, 0), name="tokenizer", steps=steps, batch_size=4, clip=0.1,
        config=config, folder=folder, tensorboard=folder / "tensorboard",
    )  # fmt: skip
    return module, curve


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    torch.set_num_threads(1)
    return *trained_by_lightning(folder), folder


def clipped(parameters):
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)


def test_it_learns_as_with_two_optimizers(judged):
    """Each of the two after the other's loss, on the pictures that were made before either stepped."""
    pl.seed_everything(0, verbose=False)
    plain = TokenizerTraining(judged[0].config, 16)
    own = [weight for weight in plain.tokenizer.parameters() if weight.requires_grad]
    theirs = list(plain.discriminator.parameters())
    settings = {"betas": (0.9, 0.99), "weight_decay": 1e-4}
    first = torch.optim.AdamW(own, lr=1e-3, **settings)
    second = torch.optim.AdamW(theirs, lr=2e-3, **settings)
    items = Shuffled(pairs(), 24, 0)
    losses = []
    for step in range(6):
        for optimizer, rate in ((first, 1e-3), (second, 2e-3)):
            optimizer.param_groups[0]["lr"] = rate * plain._rate(step)
        pictures = to_pictures(Shuffled.collate([items[4 * step + i][None] for i in range(4)]))
        with torch.random.fork_rng():
            torch.manual_seed(int(plain.seed) + step)
            codes, _, commitment = plain.quantizer(plain.tokenizer.to_latents(pictures))
        made = plain.tokenizer.from_latents(codes)
        error = 4 * F.mse_loss(made, pictures)
        loss = error + commitment
        if step >= 2:
            plain.discriminator.requires_grad_(False)
            adversarial = adversarial_loss(plain.discriminator(made))
            plain.discriminator.requires_grad_(True)
            last = plain.tokenizer.vqgan.decoder.conv_out.weight
            norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, adversarial)]
            loss = loss + 0.5 * norms[0] / norms[1] * adversarial
        first.zero_grad()
        loss.backward()
        clipped(own)
        first.step()
        if step >= 2:
            told = discriminator_loss(plain.discriminator(pictures), plain.discriminator(made.detach()))
            losses.append((adversarial.item(), told.item()))
            second.zero_grad()
            told.backward()
            clipped(theirs)
        else:
            for weight in theirs:
                weight.grad = torch.zeros_like(weight)
        second.step()
    module, curve, _ = judged
    for name in ("tokenizer", "discriminator"):
        for key, value in getattr(plain, name).state_dict().items():
            torch.testing.assert_close(module.state_dict()[f"{name}.{key}"], value, atol=2e-5, rtol=1e-3)
    assert (curve[0]["adversarial"], curve[0]["discriminator"]) == (0, 0)
    means = [tuple((one + two) / 2 for one, two in zip(*losses[i : i + 2], strict=True)) for i in (0, 2)]
    for point, expected in zip(curve[1:], means, strict=True):
        assert (point["adversarial"], point["discriminator"]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_a_discriminator_changes_what_is_learnt_from_its_start_on(judged, tmp_path):
    without, _ = trained_by_lightning(tmp_path / "without", adversarial=AdversarialConfig())
    late = AdversarialConfig(weight=0.5, start=6, channels=32, layers=1)
    never, _ = trained_by_lightning(tmp_path / "never", adversarial=late)
    one, other, found = (module.tokenizer.state_dict() for module in (without, never, judged[0]))
    assert_equal(one, other)
    assert any(not torch.equal(one[key], found[key]) for key in one)
    assert without.discriminator is None


def test_steps_in_bf16(judged, tmp_path):
    module, curve = trained_by_lightning(tmp_path, precision="bf16-mixed")
    assert {value.dtype for value in module.state_dict().values()} <= {torch.float32, torch.int64, torch.bool}
    assert module.quantizer.codebook.dtype == torch.float32  # the codes are chosen and moved in it
    whole = judged[1]
    assert curve != whole
    for point, expected in zip(curve, whole, strict=True):
        assert point["loss"] == pytest.approx(expected["loss"], rel=0.1)
        assert point["psnr"] == pytest.approx(expected["psnr"], abs=0.5)
    assert curve[-1]["discriminator"] > 0
    assert measure(module.finish(), [pairs(8)])["codes_used"] > 4


@pytest.mark.parametrize("quantizer", ["ema", "learned"])
def test_a_stopped_training_goes_on_to_the_same_result(judged, tmp_path, quantizer):
    whole, curve = judged[:2]
    if quantizer != "ema":
        whole, curve = trained_by_lightning(tmp_path / "whole", quantizer=quantizer)
    for at in (5, 14):  # in the second step, before the discriminator starts, and in the fourth
        folder = tmp_path / str(at)
        with pytest.raises(Interrupted, match=f"stopped at step {at // 4 + 1} of 6"):
            trained_by_lightning(folder, at=at, action=send(signal.SIGTERM), quantizer=quantizer)
        module, rest = trained_by_lightning(folder, quantizer=quantizer)
        assert_equal(weights_of(whole), weights_of(module))
        assert rest == curve


def test_several_processes_train_one_tokenizer_and_one_discriminator(tmp_path):
    def work():
        module, curve = trained_by_lightning(tmp_path)
        return {name: value.numpy() for name, value in module.state_dict().items()}, curve

    (one, curve), (other, _) = together(work)
    assert curve[2]["discriminator"] > 0
    assert [name for name in one if not (one[name] == other[name]).all()] == []


def test_each_network_is_clipped_by_its_own_norm():
    torch.manual_seed(0)
    module = TokenizerTraining(tiny_config(**JUDGED), 16)
    optimizer = module.configure_optimizers()["optimizer"]
    own, theirs = (group["params"] for group in optimizer.param_groups)
    assert {*map(id, theirs)} == {*map(id, module.discriminator.parameters())}
    assert not {*map(id, theirs)} & {*map(id, own)}
    for group, size in ((own, 1e-4), (theirs, 100.0)):
        for weight in group:
            weight.grad = torch.full_like(weight, size)
    before = torch.nn.utils.get_total_norm([weight.grad for weight in own])
    module.configure_gradient_clipping(optimizer, 1.0)
    assert before < 1
    assert all((weight.grad == 1e-4).all() for weight in own)
    assert torch.nn.utils.get_total_norm([weight.grad for weight in theirs]).item() == pytest.approx(
        1.0, abs=1e-4
    )
    assert module.gradient_norm == before


def test_what_tensorboard_is_shown(judged):
    module, _, folder = judged
    events = EventAccumulator(str(folder / "tensorboard" / "tokenizer")).Reload()
    assert [event.step for event in events.Images("reconstructions")] == [3, 6]
    image = events.Images("reconstructions")[-1]
    assert (image.height, image.width) == (2 * 16, 8 * 16)
    state = weights_of(module)
    found = module.diagnose()
    assert_equal(weights_of(module), state)
    assert module.quantizer.training
    pictures = to_pictures(Shuffled.collate([Shuffled(pairs(), 24, 0)[20 + i][None] for i in range(4)]))
    assert found == {"ssim": pytest.approx(ssim(module.finish()(pictures), pictures).mean().item(), abs=1e-4)}
    module.tokenizer.train()
    assert [event.step for event in events.Scalars("diagnose/ssim")] == [3, 6]
    assert events.Scalars("diagnose/ssim")[-1].value == pytest.approx(found["ssim"], abs=0.1)
