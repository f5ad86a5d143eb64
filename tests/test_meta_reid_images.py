"""META: samplers, labels, augmented images, walkers."""

import random
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from meta_reid.data import Files, augmentation, batches, file_target, label
from meta_reid.items import Item, Split
from meta_reid.samplers import DomainBatches, IdentityStream
from meta_reid.walkers import draw
from shared.io import write_image
from shared.runtime import UserError


def test_an_epoch_of_the_identity_stream():
    sizes = [4, 9, 2, 1, 12, 5]
    starts = np.cumsum([0, *sizes])
    members = [list(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    stream = IdentityStream(members, identities=2, images=4, rng=random.Random(0))
    owner = {index: person for person, group in enumerate(members) for index in group}
    given = Counter()
    while True:
        available, fresh = len(stream.available), len(stream.left)
        batch = stream.batch()
        if available < 2:
            break
        people = [owner[index] for index in batch[::4]]
        assert len(set(people)) == 2 and len(batch) == 8
        for group in range(2):
            assert {owner[i] for i in batch[4 * group : 4 * group + 4]} == {people[group]}
        given.update(people)
        assert len(stream.left) >= fresh
    # Nobody gives more groups of four than it has images for; those with fewer than four give one.
    assert all(given[person] <= max(size // 4, 1) for person, size in enumerate(sizes))
    long = [i for i, person in owner.items() if person == 4]
    again = IdentityStream([long, members[0]], 2, 4, random.Random(1))
    assert len(set(again.batch())) == 8  # without replacement


def sampler(**options):
    identities = [i // 3 for i in range(90)]
    domains = [0] * 30 + [1] * 30 + [2] * 30
    return DomainBatches(identities, domains, **{"people": 3, "images": 4, "seed": 0, "steps": 30, **options})


def test_batches_hold_one_domain_in_turn_and_a_run_resumes_exactly():
    batches = list(sampler())
    assert len(batches) == 30
    for step, batch in enumerate(batches):
        assert {index // 30 for index, _ in batch} == {step % 3}
        assert len({index // 3 for index, _ in batch}) == 3 and len(batch) == 12
        assert [number for _, number in batch] == list(range(12 * step, 12 * step + 12))
    assert list(sampler(start_step=17)) == batches[17:]
    assert list(sampler()) == batches and list(sampler(seed=1)) != batches


def test_processes_see_the_same_domain_and_other_people():
    ranks = [list(sampler(rank=rank, world=3)) for rank in range(3)]
    for step in range(30):
        people = [{index // 3 for index, _ in batches[step]} for batches in ranks]
        assert all(len(group) == 3 for group in people) and len(set.union(*people)) == 9
        assert {index // 30 for batches in ranks for index, _ in batches[step]} == {step % 3}
    draws = [number for batches in ranks for batch in batches for _, number in batch]
    assert sorted(draws) == list(range(30 * 36))


def test_shares_of_one_process_are_what_several_processes_see():
    ranks = [list(sampler(rank=rank, world=3)) for rank in range(3)]
    shares = list(sampler(shares=3))
    assert shares == [batches[step] for step in range(30) for batches in ranks]
    assert (
        len(sampler(shares=3, start_step=20)) == 30 and list(sampler(shares=3, start_step=20)) == shares[60:]
    )
    with pytest.raises(UserError, match="3 for each of 2 processes and 2 shares"):
        sampler(world=2, shares=2)


def test_a_run_of_any_length_holds_no_more_than_its_images_and_a_process_draws_its_own(monkeypatch):
    long = sampler(steps=10**9)
    assert list(islice(long, 30)) == list(sampler())  # batches are drawn as they are asked for
    drawn, batch = [], IdentityStream.batch

    def counted(stream):
        drawn.append(len(stream.members))
        return batch(stream)

    monkeypatch.setattr(IdentityStream, "batch", counted)
    list(sampler(rank=1, world=3))
    assert len(drawn) == 30 and set(drawn) <= {3, 4}  # of the ten identities of a domain


def test_a_domain_with_too_few_identities_is_named():
    with pytest.raises(UserError, match="domain CUHK03 has 10 identities, a step asks for 16"):
        sampler(people=16, names=["CUHK03", "b", "c"])


def test_labels_have_no_gaps_and_no_domain_shares_one():
    labels = label([[10, 2, 10], [2, 7, 100]], ["a", "b"])
    assert labels.local.tolist() == [1, 0, 1, 0, 1, 2] and labels.union.tolist() == [1, 0, 1, 2, 3, 4]
    assert labels.classes == [2, 3] and labels.domain.tolist() == [0, 0, 0, 1, 1, 1]


def test_files_are_augmented_by_their_draw_alone_and_damaged_ones_named(tmp_path):
    path = tmp_path / "a.png"
    write_image(path, torch.rand(3, 40, 20, generator=torch.Generator().manual_seed(0)))
    files = Files([Item(path, 1, 0), Item(tmp_path / "torn.jpg", 1, 0)], (32, 16), seed=3)
    assert Files(files.items, (32, 16)).augment is None  # an evaluation waits for no augmentation's library
    plain, index = files[0]
    assert plain.shape == (3, 32, 16) and plain.dtype == torch.uint8 and plain.max() > 100 and index == 0
    torch.manual_seed(1)
    first = files[0, 5][0]
    torch.manual_seed(2)
    assert torch.equal(files[0, 5][0], first)
    assert any(not torch.equal(files[0, n][0], first) for n in range(5))
    (tmp_path / "torn.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match="torn.jpg"):
        files[1]
    with pytest.raises(UserError, match="torn.jpg") as caught:
        list(batches(DataLoader(files, 2, num_workers=1)))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("shape", [(300, 120), (256, 128), (90, 300)])
def test_images_are_resized_as_pil_does(shape, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    wanted = np.asarray(Image.fromarray(noise).resize((128, 256), Image.Resampling.BICUBIC))
    found = Files([Item(tmp_path / "a.png", 1, 0)])[0][0]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)
    step = augmentation((256, 128)).transforms[1]  # after AutoAugment, as officially
    assert torch.equal(step(torch.from_numpy(noise).permute(2, 0, 1)), found)


def test_the_augmentation_is_the_official_one_in_its_order():
    auto, _, flip, frame, crop, jitter = augmentation((32, 16)).transforms
    assert auto.p == 0.1 and auto.transforms[0].policy == v2.AutoAugmentPolicy.IMAGENET
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    assert isinstance(frame, v2.Pad) and (frame.padding, frame.fill, frame.padding_mode) == (
        10,
        0,
        "constant",
    )
    assert isinstance(crop, v2.RandomCrop) and crop.size == (32, 16) and crop.padding is None
    (colour,) = jitter.transforms
    assert jitter.p == 0.5 and isinstance(colour, v2.ColorJitter)
    assert colour.brightness == (0.85, 1.15) and colour.contrast == (0.9, 1.1)
    assert colour.saturation is None and colour.hue is None


def test_images_that_several_splits_use_are_embedded_once(tmp_path):
    a, b, c = (Item(tmp_path / name, n, 0) for n, name in enumerate("abc"))
    target = file_target("T", [Split([a], [b, c]), Split([b], [c])], (8, 4))
    assert len(target.images) == 3 and target.identities.tolist() == [0, 1, 2]
    assert target.splits[1][0].tolist() == [1] and target.splits[1][1].tolist() == [2]


def test_walkers_keep_their_clothes_and_sites_their_look():
    first, again = draw("A", 5, 4, 7), draw("A", 5, 4, 7)
    assert torch.equal(first.images, again.images) and first.images.shape == (20, 3, 48, 24)
    other = draw("T", 5, 4, 7)
    assert torch.equal(first.identities, other.identities)
    gap = (first.images.float() - other.images.float()).mean((0, 2, 3)).abs().max()
    assert gap > 5 and not torch.equal(draw("A", 5, 4, 8).images, first.images)
