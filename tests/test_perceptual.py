import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS

from delvm.errors import UserError
from delvm.tokenizer.perceptual import MIN_SIDE, Perceptual

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def published():
    """torchmetrics' LPIPS, with its heads and a network that has learnt nothing."""
    torch.manual_seed(0)
    return _LPIPS(net="vgg", pnet_rand=True)


@pytest.fixture(scope="module")
def weights(published, tmp_path_factory):
    """That network's weights under torchvision's names, with a classifier beside them."""
    file = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    state = {
        f"features.{name.partition('.')[2]}": value for name, value in published.net.state_dict().items()
    }
    torch.save({**state, "classifier.0.bias": torch.zeros(4)}, file)
    return file


def test_it_is_lpips(published, weights):
    generator = torch.Generator().manual_seed(1)
    pictures, noise = (torch.rand(3, 3, 32, 24, generator=generator) for _ in range(2))
    found = (0.7 * pictures + 0.3 * noise).requires_grad_()
    distance = Perceptual(weights)(found, pictures)
    expected = published(found, pictures, normalize=True).flatten()
    torch.testing.assert_close(distance, expected)
    assert distance.min() > 0.001
    # and so are its gradients
    ours, theirs = (torch.autograd.grad(values.sum(), found)[0] for values in (distance, expected))
    torch.testing.assert_close(ours, theirs)


def test_equal_pictures_have_no_distance_and_no_gradient(weights):
    pictures = torch.zeros(2, 3, MIN_SIDE, MIN_SIDE)
    found = pictures.clone().requires_grad_()
    distance = Perceptual(weights)(found, pictures)
    distance.sum().backward()
    assert distance.tolist() == [0.0, 0.0]
    assert not found.grad.any()


def test_building_it_draws_no_random_numbers(weights):
    state = torch.get_rng_state()
    Perceptual(weights)
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_no_vgg16_is_refused_in_one_line(weights, tmp_path):
    broken, other, missing = (tmp_path / name for name in ("broken.pth", "other.pth", "missing.pth"))
    broken.write_bytes(weights.read_bytes()[:1000])
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, other)
    small = torch.load(weights, weights_only=True)
    small["features.28.bias"] = torch.zeros(3)
    torch.save(small, tmp_path / "small.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for file in (broken, other, missing, tmp_path / "small.pth", tmp_path / "list.pth"):
        with pytest.raises(
            UserError, match=r"^tokenizer\.perceptual_weights: '.*' is not torchvision's VGG16, vgg16-397"
        ) as error:
            Perceptual(file)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)
