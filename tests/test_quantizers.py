import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from delvm.tokenizer.quantizers import QUANTIZERS, build_quantizer

pytestmark = pytest.mark.usefixtures("one_thread")
COSINE = ("cosine", "cosine_rotation")


def make(name, **changes):
    torch.manual_seed(0)
    sizes = {"num_codes": 8, "code_dim": 4, "commitment": 0.25, "decay": 0.5, "restart_below": 0.0}
    return build_quantizer(name, **{**sizes, **changes})


def latents(seed=0, num=32):
    """(num, 4, 2, 2) around eight directions."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(8, 4, generator=torch.Generator().manual_seed(9))
    near = centres[torch.randint(8, (num, 2, 2), generator=generator)]
    return (near + 0.1 * torch.randn(near.shape, generator=generator)).permute(0, 3, 1, 2)


def nearest(values, codebook):
    """The ids of the nearest codes, and their distances."""
    distances = torch.cdist(values.permute(0, 2, 3, 1).flatten(0, 2), codebook).double()
    return distances.argmin(-1), distances


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_plain_lookup_finds_the_same_codes(name):
    quantizer = make(name)
    for seed in range(3):
        quantizer(latents(seed).requires_grad_())
    quantizer.eval()
    values = 3.0 * latents(7)
    codes, ids, _ = quantizer(values)
    found, _ = nearest(values, quantizer.codebook)
    assert torch.equal(ids.flatten(), found)
    assert len(found.unique()) >= 4
    torch.testing.assert_close(codes.permute(0, 2, 3, 1).flatten(0, 2), quantizer.codebook[found])
    lengths = quantizer.codebook.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones(8)) == (name in COSINE)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_codes_start_at_the_k_means_of_the_first_batch(name):
    generator = torch.Generator().manual_seed(1)
    centres = torch.eye(4)[:3]  # of length 1, as the codes of some
    near = centres[torch.randint(3, (32, 2, 2), generator=generator)]
    near = near + 0.01 * torch.randn(near.shape, generator=generator)
    quantizer = make(name, num_codes=16)
    quantizer(near.permute(0, 3, 1, 2))
    distances = torch.cdist(quantizer.codebook, centres)
    assert distances.amin(1).max() < 0.1  # every code is at a centre,
    assert distances.amin(0).max() < 0.1  # and every centre has one


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), length=st.floats(0.01, 100))
def test_of_codes_of_one_length_the_nearest_is_that_at_the_smallest_angle(seed, length):
    generator = torch.Generator().manual_seed(seed)
    codebook = torch.nn.functional.normalize(torch.randn(16, 4, generator=generator), dim=-1)
    values = length * torch.randn(8, 4, 1, 1, generator=generator)
    found, _ = nearest(values.double(), codebook.double())
    assert torch.equal(found, (values.flatten(1).double() @ codebook.T.double()).argmax(-1))


def gradient(name, values, weights):
    """The gradient that reaches the latents when the codes' product with `weights` is the loss."""
    quantizer = make(name, commitment=0.0)
    quantizer(values)  # k-means
    values = values.clone().requires_grad_()
    codes, _, _ = quantizer(values)
    (codes * weights).sum().backward()
    return values.grad, values.detach(), codes.detach()


def test_ema_hands_the_codes_gradient_on_as_it_is():
    weights = torch.randn(32, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    found, _, _ = gradient("ema", latents(), weights)
    torch.testing.assert_close(found, weights)


def test_rotation_turns_the_gradient_as_the_latent_turns_to_its_code():
    weights = torch.randn(32, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    found, values, codes = gradient("rotation", latents(), weights)
    # a rotation and a scaling keep angles: gradient to latent as the codes' gradient to code
    angle = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(angle(found, values), angle(weights, codes), atol=1e-4, rtol=0)
    assert not torch.allclose(found, weights, atol=1e-2)


def test_codes_that_follow_moving_averages_and_codes_that_learn():
    values = latents().requires_grad_()
    for name in QUANTIZERS:
        quantizer = make(name)
        learnt = dict(quantizer.named_parameters())
        assert len(learnt) == (name == "learned"), name
        quantizer(values)
        before = quantizer.codebook.clone()
        _, _, loss = quantizer(values + 0.5)
        assert torch.equal(quantizer.codebook, before) == (name == "learned"), name
        if learnt:
            loss.backward()
            assert (quantizer._codebook.embed.grad.abs().sum(-1) > 0).any()


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_code_out_of_use_starts_anew_at_a_latent(name):
    far = {}
    for restart_below in (0.0, 2.0):
        quantizer = make(name, restart_below=restart_below, decay=0.1)
        quantizer(latents())
        there = torch.full((32, 4, 2, 2), 5.0) + torch.arange(4).view(1, 4, 1, 1)
        for _ in range(4):
            quantizer(there)
        point = there[:1]
        if name in COSINE:
            point = torch.nn.functional.normalize(point, dim=1)
        far[restart_below] = nearest(point, quantizer.codebook)[1][0]
    # all but the code that is in use lie where the latents now are, or where these were
    assert (far[2.0] < 0.1).sum() >= 7
    assert (far[0.0] < 0.1).sum() <= 1
