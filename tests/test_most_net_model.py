"""MOST-Net: networks, memory, style transfer and losses."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import profile
from torchvision.models.vgg import cfgs, make_layers

from most_net import literal, losses
from most_net.baselines import UNet, dodge, grey, neighbour_patches
from most_net.memory import Memory, merge, usage_perplexity
from most_net.model import (
    FULL,
    TINY,
    Architecture,
    Discriminator,
    MostNet,
    ReflectedConv,
    adain,
    flatten,
    initialise,
)
from most_net.train import PRESETS
from shared.bench import count_macs, count_parameters
from shared.runtime import UserError, parse_presets

SMALL = Architecture(base=4, downs=2, dilations=(1,), decoder_blocks=1, slots=6, revive_after=2)


def unit(count: int, channels: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, channels, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain(count: int, channels: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def test_reflected_borders_are_those_of_pytorch_without_a_change_of_type():
    options = {"padding": 2, "dilation": 2, "padding_mode": "reflect"}
    ours, theirs = ReflectedConv(3, 4, 3, **options), nn.Conv2d(3, 4, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 7, 9)
    assert torch.equal(ours(x), theirs(x))
    x = x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with profile() as trace:
            low = ours(x)
        assert low.dtype == torch.bfloat16 and torch.equal(low, theirs(x))
    copied = sum(event.count for event in trace.key_averages() if event.key == "aten::_to_copy")
    assert copied == 2  # weight and bias; the input is not widened and narrowed


# --- sizes --------------------------------------------------------------------------------------------


def test_full_size_parameters():
    net = MostNet(FULL)
    assert count_parameters(net.photo_encoder) == 5_385_856 + 512
    assert count_parameters(net.sketch_encoder) == 5_379_584 + 512
    assert count_parameters(net.key_head) == 65_792
    assert count_parameters(net.fuse) == 131_328
    assert count_parameters(net.decoder) == 5_379_329
    disc = Discriminator()
    assert sum(p.numel() for p in disc.parameters()) == 2_764_800
    assert net.memories[0].keys.shape == net.memories[0].values.shape == (512, 256)


def test_full_size_cost():
    """On a quarter of the side every convolution costs a sixteenth of what 256x256 costs."""
    with torch.device("meta"):
        net = MostNet(FULL)
        photo, feature = torch.empty(1, 3, 64, 64), torch.empty(1, 256, 16, 16)
        assert 16 * count_macs(net.photo_encoder, photo) == pytest.approx(24.24e9, rel=1e-3)
        assert 16 * count_macs(net.sketch_encoder, photo[:, :1]) == pytest.approx(23.83e9, rel=1e-3)
        assert 16 * count_macs(net.decoder, feature) == pytest.approx(23.83e9, rel=1e-3)
    disc = Discriminator()
    photo = torch.zeros(1, 3, 256, 256)
    assert count_macs(disc, photo, photo[:, :1]) == pytest.approx(3.16e9, rel=0.01)
    assert disc(photo, photo[:, :1]).shape == (1, 1, 30, 30)


@pytest.mark.parametrize("arch", [SMALL, TINY])
@pytest.mark.parametrize("kind", ["none", "dynamic", "grad"])
def test_forward_shapes(arch, kind):
    net = MostNet(arch, kind)
    photo, sketch = torch.rand(2, 3, 32, 24), torch.rand(2, 1, 32, 24)
    out = net(photo, sketch)
    assert out["sketch"].shape == (2, 1, 32, 24)
    if kind == "none":
        assert set(out) == {"sketch"}
        return
    h, w = 32 // 2**arch.downs, 24 // 2**arch.downs
    assert out["recon"].shape == (2, 1, 32, 24)
    assert out["slot"].shape == (2, h, w)
    assert out["retrieved"].shape == out["features"].shape == (2, arch.channels, h, w)
    assert out["slot"].max() < arch.slots


def test_any_size_and_the_same_answer_from_both_paths():
    net = MostNet(SMALL).eval()
    photo = torch.rand(2, 3, 40, 32) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(net.sketch(photo), net(photo)["sketch"].clamp(-1, 1), atol=1e-5)
        assert net.sketch(torch.rand(1, 3, 37, 51)).shape == (1, 1, 37, 51)


def test_one_decoder_call_equals_two():
    net = MostNet(SMALL).eval()
    photo, sketch = torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16)
    out = net(photo, sketch)
    f = net.photo_encoder(photo)
    assert torch.allclose(out["sketch"], net.decode(f, out["retrieved"]), atol=1e-6)
    assert torch.allclose(out["recon"], net.decode(f, net.sketch_encoder(sketch)), atol=1e-6)


def test_initialisation_is_small_and_without_bias():
    net = initialise(MostNet(SMALL))
    assert net.fuse.bias.abs().max() == 0
    assert 0 < net.fuse.weight.std() < 0.02


# --- memory -------------------------------------------------------------------------------------------


def test_reading_equals_the_literal_form_by_both_paths():
    memory, queries = Memory(8, 12), unit(20, 8)
    memory.values.copy_(plain(12, 8))
    expected = literal.literal_read(memory, queries)
    assert torch.allclose(memory.read(queries), expected, atol=1e-6)
    assert torch.allclose(memory.read(queries, memory.scores(queries)), expected, atol=1e-6)


def test_reading_the_best_slots_only():
    memory, queries = Memory(8, 12, topk=1), unit(20, 8)
    best = (queries @ memory.keys.T).argmax(1)
    assert torch.allclose(memory.read(queries), memory.values[best])


def test_writing_equals_the_slot_loop():
    fast, slow = Memory(8, 12), Memory(8, 12)
    slow.load_state_dict(fast.state_dict())
    for seed in range(4):
        queries, features = unit(30, 8, seed), plain(30, 8, seed + 10)
        fast.write(queries, features, fast.scores(queries), revive=False)
        literal.literal_write(slow, queries, features)
    for name, value in fast.state_dict().items():
        assert torch.allclose(value.float(), slow.state_dict()[name].float(), atol=1e-6), name
    assert torch.allclose(fast.keys.norm(dim=1), torch.ones(12), atol=1e-6)
    assert fast.usage.sum() == 120


def test_mnad_weighting_by_hand():
    memory = Memory(2, 2, momentum=0.0, weighting="mnad")
    memory.keys.copy_(torch.eye(2))
    queries = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.5]]), dim=1)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    memory.write(queries, features, memory.scores(queries), revive=False)
    # Both hit slot 0 with scores 1 and s; weights exp(s - best) are 1 and exp(s - 1).
    w = torch.exp(queries[1, 0] - 1)
    assert torch.allclose(memory.values[0], torch.stack([1 / (1 + w), w / (1 + w)]))
    assert torch.allclose(memory.keys[0], F.normalize(queries[0] + w * queries[1], dim=0))


def test_unused_slots_are_given_to_badly_matched_queries():
    memory = Memory(8, 12, revive_after=2)
    queries, features = memory.keys[:1].repeat(40, 1), plain(40, 8)
    for step in range(3):
        assert memory.age.max() == step
        before = memory.keys[1:].clone()
        memory.write(queries, features, memory.scores(queries), torch.Generator().manual_seed(step))
        changed = (memory.keys[1:] != before).any(1).sum()
        # The third step makes the age 3, and 8 of the 11 unused slots are filled at once.
        assert changed == (8 if step == 2 else 0)
    assert (memory.age == 3).sum() == 3
    assert torch.allclose(memory.scores(queries)[0].sort(descending=True).values[:9], torch.ones(9))


def test_the_worst_matched_queries_are_taken():
    memory = Memory(8, 12, revive_after=0)
    near = F.normalize(memory.keys[:1] + 0.01 * plain(160, 8), dim=1)
    far = F.normalize(-memory.keys.sum(0) + 0.01 * plain(160, 8), dim=1)
    queries = torch.cat([near, far])
    worst = memory.scores(queries).amax(1)
    assert worst[:160].min() > worst[160:].max()
    memory._revive(queries, queries, worst, torch.Generator().manual_seed(0))  # ages are 0: none yet
    before = memory.keys.clone()
    memory.age += 1
    memory._revive(queries, queries, worst, torch.Generator().manual_seed(0))
    revived = memory.keys[(memory.keys != before).any(1)]
    assert len(revived) == 8
    assert all((far == key).all(1).any() for key in revived)


def test_kmeans_start_and_perplexity():
    centres = unit(4, 8)
    queries = F.normalize(centres.repeat(50, 1) + 0.02 * plain(200, 8), dim=1)
    memory = Memory(8, 4)
    # One query of each cluster to begin with: every generator seed draws four different ones.
    memory.fit(queries, queries * 3, torch.Generator().manual_seed(2), rounds=5)
    assert memory.usage.sum() == memory.age.sum() == 0
    assert torch.allclose(memory.keys.norm(dim=1), torch.ones(4), atol=1e-5)
    assert F.cosine_similarity(memory.values, memory.keys, dim=1).min() > 0.99
    assert usage_perplexity(torch.tensor([5, 5, 5, 5])) == pytest.approx(4.0)
    assert usage_perplexity(torch.tensor([7, 0, 0])) == pytest.approx(1.0)


def test_merged_memory_answers_with_both():
    first, second = Memory(8, 3), Memory(8, 5)
    both = merge(first, second)
    queries = unit(6, 8)
    assert both.slots == 8
    assert torch.allclose(both.scores(queries)[:, 3:], second.scores(queries), atol=1e-6)
    assert torch.equal(both.values[:3], first.values)
    learned = Memory(8, 3, learned=True)
    with torch.no_grad():
        learned.keys *= 3  # gradient descent keeps no length
    both = merge(learned, second)
    assert torch.allclose(both.scores(queries)[:, :3], learned.scores(queries), atol=1e-6)
    assert not both.learned and torch.allclose(both.keys.norm(dim=1), torch.ones(8))


def test_only_training_writes_and_the_state_dict_holds_all():
    net = MostNet(SMALL)
    photo, sketch = torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16)
    before = net.memories[0].keys.clone()
    net.eval()
    net.write(net(photo, sketch))
    net.sketch(photo)
    assert torch.equal(net.memories[0].keys, before)
    net.train()
    net.write(net(photo, sketch))
    assert not torch.equal(net.memories[0].keys, before)
    again = MostNet(SMALL)
    again.load_state_dict(net.state_dict())
    assert torch.equal(again.eval().sketch(photo), net.eval().sketch(photo))
    assert {"memories.0.keys", "memories.0.values", "memories.0.age"} <= net.state_dict().keys()


def test_where_gradients_go():
    photo, sketch = torch.rand(1, 3, 16, 16), torch.rand(1, 1, 16, 16)
    net = MostNet(SMALL)
    out = net(photo, sketch)
    losses.mr_align_loss(out["retrieved"], out["features"]).backward(retain_graph=True)
    assert net.key_head.project.weight.grad.abs().sum() > 0
    assert net.photo_encoder.body[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in net.sketch_encoder.parameters())  # stop gradient
    losses.pixel_loss(out["recon"], sketch).backward()
    assert net.sketch_encoder.body[0].weight.grad.abs().sum() > 0
    assert not net.memories[0].keys.requires_grad

    learned = MostNet(SMALL, "grad")
    losses.pixel_loss(learned(photo)["sketch"], sketch).backward()
    assert learned.memories[0].keys.grad.abs().sum() > 0
    assert learned.memories[0].values.grad.abs().sum() > 0


def test_every_artist_has_a_memory():
    net = MostNet(SMALL, styles=2).eval()
    photo = torch.rand(1, 3, 16, 16)
    with torch.inference_mode():
        assert not torch.equal(net.sketch(photo, 0), net.sketch(photo, 1))
    assert MostNet(SMALL, "none").sketch(photo).shape == (1, 1, 16, 16)


# --- style --------------------------------------------------------------------------------------------


def test_adain_takes_over_the_statistics():
    f, style = torch.randn(2, 3, 8, 8), 2 * torch.randn(2, 3, 8, 8) + 1
    got = adain(f, style)
    assert torch.allclose(got.mean((2, 3)), style.mean((2, 3)), atol=1e-5)
    assert torch.allclose(got.std((2, 3)), style.std((2, 3)), rtol=1e-3)
    assert torch.allclose(adain(f, style, strength=0.0), f, atol=1e-3)
    half = adain(f, style, strength=0.5)
    assert torch.allclose(half.mean((2, 3)), (f.mean((2, 3)) + style.mean((2, 3))) / 2, atol=1e-5)


# --- losses -------------------------------------------------------------------------------------------


def test_losses_by_hand():
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.6, 0.55, -0.3]])
    expected = ((1 - 0.9) + (1 - 0.6)) / 2 + (0.0 + (0.55 - 0.6 + 0.2)) / 2
    assert losses.mr_slot_loss(scores).item() == pytest.approx(expected)
    same = torch.randn(2, 5, 3, 3)
    assert losses.mr_align_loss(same, 3 * same).item() == pytest.approx(0, abs=1e-6)
    assert losses.mr_align_loss(same, -same).item() == pytest.approx(2)
    values = torch.eye(3)
    match = losses.mr_match_loss(values[:2], values, torch.tensor([0, 1]), tau=0.5)
    assert match.item() == pytest.approx(-torch.tensor([2.0, 0, 0]).log_softmax(0)[0].item())
    real, fake = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0])
    assert losses.discriminator_loss(real, fake).item() == pytest.approx(0.5 * (0.125 + 0.5))
    assert losses.adversarial_loss(fake).item() == pytest.approx(0.5)
    image = torch.rand(1, 1, 16, 16) * 2 - 1
    assert losses.ssim_loss(image, image).item() == pytest.approx(0, abs=1e-5)


def test_perceptual_loss_from_a_file(tmp_path):
    features = make_layers(cfgs["E"]).state_dict()
    state = {f"features.{name}": value for name, value in features.items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(4)}, tmp_path / "vgg.pth")
    loss = losses.Perceptual(tmp_path / "vgg.pth")
    a = torch.rand(1, 1, 32, 32, requires_grad=True)
    assert loss(a, a.detach()).item() == 0
    loss(a, torch.rand(1, 1, 32, 32)).backward()
    assert a.grad.abs().sum() > 0
    assert [x.shape[1] for x in loss.activations(a)] == [64, 128, 256, 512, 512]
    with pytest.raises(UserError, match="no file .*gone.pth; .*--weights.perceptual 0"):
        losses.Perceptual(tmp_path / "gone.pth")
    # The option that it names is one.
    assert parse_presets(PRESETS, "", ["paper", "--weights.perceptual", "0"]).weights.perceptual == 0


# --- baselines ----------------------------------------------------------------------------------------


def test_simple_baselines():
    photo = torch.rand(2, 3, 24, 20)
    assert grey(photo).shape == dodge(photo).shape == (2, 1, 24, 20)
    # Where nothing changes the dodge sketch is white paper.
    assert torch.allclose(dodge(torch.full((1, 3, 24, 20), 0.4)), torch.ones(1, 1, 24, 20), atol=1e-5)


def test_neighbour_patches_repeat_what_they_know():
    """A photo of the training set gets its own sketch back: every patch's nearest neighbour is itself."""
    photos, sketches = torch.rand(5, 3, 24, 20), torch.rand(5, 1, 24, 20)
    got = neighbour_patches(photos[:2], photos, sketches, patch=8, neighbours=1)
    assert torch.allclose(got, sketches[:2], atol=1e-5)
    with pytest.raises(ValueError, match="even side"):
        neighbour_patches(photos, photos, sketches, patch=7)


def test_unet():
    net = UNet(256)
    assert count_parameters(net) == pytest.approx(54.4e6, rel=0.01)
    small = UNet(32, base=4)
    assert small(torch.rand(2, 3, 32, 32))["sketch"].shape == (2, 1, 32, 32)
    assert small.eval().sketch(torch.rand(1, 3, 40, 30)).shape == (1, 1, 40, 30)
    with pytest.raises(ValueError, match="power of two"):
        UNet(48)


def test_flatten_keeps_positions():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(flatten(x)[4 * 5 + 5 + 2], x[1, :, 1, 2])
