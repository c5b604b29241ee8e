import pytest
import torch

from delvm.tokenizer.adversarial import (
    MAX_WEIGHT,
    AdversarialConfig,
    Discriminator,
    adaptive_weight,
    adversarial_loss,
    discriminator_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_it_judges_patches(layers, patch):
    """One judgement depends on a square of so many pixels."""
    torch.manual_seed(0)
    # without GroupNorm, whose means see all of a picture
    network = torch.nn.Sequential(
        *(part for part in Discriminator(32, layers).network if not isinstance(part, torch.nn.GroupNorm))
    )
    pictures = torch.rand(1, 3, 128, 128, requires_grad=True)
    judged = network(pictures)
    side = judged.shape[-1]
    judged[0, 0, side // 2, side // 2].backward()
    rows = torch.nonzero(pictures.grad.abs().sum((0, 1, 3))).flatten()
    assert int(rows.max() - rows.min()) + 1 == patch


def test_the_smallest_picture_has_one_judgement():
    for layers in (1, 2, 3):
        side = AdversarialConfig(layers=layers).min_side
        discriminator = Discriminator(32, layers)
        assert discriminator(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)
        with pytest.raises(RuntimeError):
            discriminator(torch.zeros(2, 3, side - 1, side - 1))


def test_a_judgement_depends_on_its_picture_alone():
    torch.manual_seed(0)
    discriminator, pictures = Discriminator(32, 2), torch.rand(4, 3, 24, 24)
    together = discriminator(pictures)
    alone = torch.cat([discriminator(picture[None]) for picture in pictures])
    torch.testing.assert_close(together, alone)
    assert together.std() > 0


def test_to_please_it_leaves_its_weights_alone():
    torch.manual_seed(0)
    discriminator = Discriminator(32, 1)
    pictures = torch.rand(2, 3, 16, 16, requires_grad=True)
    pleased = discriminator.judge(pictures)
    assert torch.equal(pleased, discriminator(pictures))
    pleased.sum().backward()
    assert pictures.grad.abs().min() > 0
    assert all(weight.grad is None for weight in discriminator.parameters())
    discriminator(pictures.detach()).sum().backward()
    assert all(weight.grad.any() for weight in discriminator.parameters())


def test_losses():
    of_true, of_made = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, 0.0, 3.0])
    # hinges 0, 0.5, 2 of the true ones and 0, 1, 4 of the others
    assert discriminator_loss(of_true, of_made).item() == pytest.approx(0.5 * (2.5 / 3 + 5 / 3))
    assert adversarial_loss(of_made).item() == pytest.approx(-1 / 3)


def test_the_adaptive_weight_makes_the_gradients_alike():
    torch.manual_seed(0)
    last = torch.randn(6, 4, requires_grad=True)
    values = torch.randn(5, 6) @ last
    error, adversarial = values.square().mean(), 0.01 * values.tanh().mean()
    weight = adaptive_weight(error, adversarial, last)
    assert not weight.requires_grad
    norms = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (error, adversarial)]
    torch.testing.assert_close(weight * norms[1], norms[0], rtol=1e-2, atol=0)
    # no gradient to speak of, no weight without bound
    assert adaptive_weight(error, 0.0 * adversarial, last).item() == MAX_WEIGHT
    assert adaptive_weight(0.0 * error, adversarial, last).item() == 0.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", -0.1), ("weight", float("nan")), ("start", -1), ("channels", 16), ("channels", 48),
        ("layers", 0), ("learning_rate", 0.0), ("learning_rate", float("inf")),
    ],
)  # fmt: skip
def test_impossible_settings(key, value):
    with pytest.raises(ValueError, match=rf"^adversarial\.{key}: .*must be"):
        AdversarialConfig(**{key: value})
