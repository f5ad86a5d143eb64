"""AnyFace: the simple world, captions, every public layout in miniature, codes, features and draws."""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from anyface.captions import NOUNS, STATES, WORN, celeba_captions, read_attributes
from anyface.clip import WordTokenizer
from anyface.codes import CodesOptions, main
from anyface.data import (
    build_cache,
    cut,
    draw_pairs,
    encode_captions,
    face_ids,
    mixed,
    open_faces,
    world_codes,
)
from anyface.datasets import (
    choose_captions,
    find_layout,
    open_set,
    read_captions,
    read_codes,
    write_codes,
)
from anyface.parts import small_clip, small_generator
from anyface.train import PRESETS
from anyface.world import (
    HELD_OUT,
    TRAITS,
    describe,
    draw_latents,
    every_wording,
    make_world,
    mentioned,
    read_traits,
    render,
)
from shared.io import write_image
from shared.runtime import UserError, parse

# --- the world -----------------------------------------------------------------------------------------


def test_traits_are_quantiles_of_one_coordinate():
    coarse, fine = draw_latents(4000, 0)
    values = read_traits(coarse, fine)
    for t, trait in enumerate(TRAITS):
        shares = torch.bincount(values[:, t], minlength=len(trait.shares)) / 4000
        assert torch.allclose(shares, torch.tensor(trait.shares), atol=0.03), trait.name
    changed = fine.clone()
    changed[:, 1] += 10
    other = read_traits(coarse, changed)
    moved = [trait.name for t, trait in enumerate(TRAITS) if (other[:, t] != values[:, t]).any()]
    assert moved == ["skin"]


def test_pictures_depend_on_traits_where_they_should():
    coarse, fine = draw_latents(6, 1)
    pictures = render(coarse, fine, 32)
    assert pictures.shape == (6, 3, 32, 32) and pictures.abs().max() <= 1
    assert torch.equal(render(coarse[2:3], fine[2:3], 32), pictures[2:3])  # whatever the batch
    wall = fine.clone()
    wall[:, 2] = torch.where(fine[:, 2] > 0, -3.0, 3.0)
    changed = (render(coarse, wall, 32) - pictures).abs().amax(1)
    assert (changed[:, 0, 0] > 0.1).all() and (changed[:, 18, 16] < 0.02).all()  # the corner, not the nose
    still = fine.clone()
    still[:, 10:] += 1
    assert torch.equal(render(coarse, still, 32), pictures)


def test_style_mixing_draws_the_coarse_of_one_with_the_fine_of_the_other():
    coarse, fine = draw_latents(2, 3)
    swapped = read_traits(coarse, fine.flip(0))
    own = read_traits(coarse, fine)
    for t, trait in enumerate(TRAITS):
        assert torch.equal(swapped[:, t], own[:, t] if trait.coarse else own[:, t].flip(0)), trait.name
    generator = small_generator()
    world = make_world(3, 0)
    codes = world_codes(generator, world)
    assert codes.shape == (3, 8, 64)
    assert torch.equal(codes[:, :4], generator.mapping(world.z_coarse)[:, None].expand(-1, 4, -1))
    assert torch.equal(codes[:, 4:], generator.mapping(world.z_fine)[:, None].expand(-1, 4, -1))
    assert mixed(codes[:, 0], codes[:, 7], 10).shape == (3, 10, 64)


def test_captions_state_only_what_is_true_and_read_back():
    world = make_world(120, 5, per_face=4)
    for i in range(120):
        for caption in world.captions[i] + world.unseen[i]:
            pairs = mentioned(caption)
            assert 1 <= len(pairs) <= 4, caption
            assert all(world.values[i, t] == value for t, value in pairs), caption
    four = describe(world.values, 0, traits=("hair colour", "hat", "lips", "skin"))
    names = [trait.name for trait in TRAITS]
    for (caption,) in four:
        assert [names[t] for t, _ in mentioned(caption)] == ["hair colour", "hat", "lips", "skin"]


def test_held_out_wordings_are_held_out():
    world = make_world(200, 6, per_face=5)
    trained = " . ".join(caption for own in world.captions for caption in own)
    unseen = " . ".join(caption for own in world.unseen for caption in own)
    for trait in TRAITS:
        for wordings in trait.phrases:
            assert f" {wordings[HELD_OUT]} " not in f" {trained} ".replace(",", " ")
            assert wordings[HELD_OUT] in unseen


def test_the_vocabulary_knows_every_word_of_the_world():
    _, tokenizer = small_clip()
    world = make_world(200, 7, per_face=3)
    tokens = tokenizer([caption for own in world.captions + world.unseen for caption in own])
    assert not (tokens == 1).any()
    assert (tokenizer(["a zebra"]) == 1).sum() == 1
    assert every_wording()


def test_worlds_are_functions_of_their_seed():
    a, b, c = make_world(5, 1), make_world(5, 1), make_world(5, 2)
    assert a.captions == b.captions and torch.equal(a.values, b.values)
    assert not torch.equal(a.z_fine, c.z_fine)


# --- public layouts ------------------------------------------------------------------------------------


def picture(path, level=0.5, size=24):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, torch.full((3, size, size), level))


def text(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def mm_celeba(tmp_path):
    for i in range(5):
        picture(tmp_path / "image" / f"{i}.jpg")
        text(tmp_path / "celeba-caption" / f"{i}.txt", *(f"caption {k} of face {i}" for k in range(10)))
    for part, stems in (("train", ["0", "3", "1"]), ("test", ["2", "4"])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "filenames.pickle").write_bytes(pickle.dumps(stems))
    return tmp_path


def test_multi_modal_celeba_hq(mm_celeba):
    assert find_layout(mm_celeba) == "mm-celeba-hq"
    train, test = open_set(mm_celeba, "train"), open_set(mm_celeba, "test")
    assert train.names == ["0", "3", "1"] and test.names == ["2", "4"]
    assert train.captions[1][9] == "caption 9 of face 3" and len(test.captions[0]) == 10
    image = train.picture(0, 16)
    assert image.shape == (3, 16, 16) and image.abs().max() < 0.02
    (mm_celeba / "celeba-caption" / "3.txt").write_text("\n \n")
    with pytest.raises(UserError, match="3.txt: holds no caption"):
        open_set(mm_celeba, "train")
    (mm_celeba / "celeba-caption" / "3.txt").unlink()
    with pytest.raises(UserError, match="3.txt: no such caption file"):
        open_set(mm_celeba, "train")


def test_a_pickle_of_names_runs_nothing(mm_celeba):
    class Evil:
        def __reduce__(self):
            return (print, ("run",))

    (mm_celeba / "train" / "filenames.pickle").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(UserError, match="refused"):
        open_set(mm_celeba, "train")
    (mm_celeba / "train" / "filenames.pickle").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match="list of file names"):
        open_set(mm_celeba, "train")


def celeba_text(root, captions=True):
    for i in (7, 12, 30):
        picture(root / "CelebAimg" / f"{i}.jpg")
        if captions:
            text(root / "captions" / f"{i}.txt", "", *(f"line {k}" for k in range(12)))
    text(root / "data_flist" / "train.flist", "/data/celeba/images/7.jpg", "/data/celeba/images/30.jpg")
    text(root / "data_flist" / "test.flist", "/data/celeba/images/12.jpg")
    names = [*NOUNS, *WORN, *STATES, "Blurry", "Male"]
    flags = {7: {"Male", "Smiling", "Wearing_Hat"}, 12: set(), 30: {"Bangs", "Young"}}
    rows = [f"{i}.jpg " + " ".join("1" if n in own else "-1" for n in names) for i, own in flags.items()]
    text(root / "CelebAMask-HQ-attribute-anno.txt", "3", " ".join(names), *rows)
    return root


def test_celebatext_hq(tmp_path):
    root = celeba_text(tmp_path)
    train = open_set(root, "train")
    assert train.title == "CelebAText-HQ" and train.names == ["7", "30"]
    assert train.captions[0] == [f"line {k}" for k in range(10)]  # blank lines skipped, the first ten kept
    assert open_set(root, "test").names == ["12"]
    (root / "CelebAimg" / "30.jpg").unlink()
    with pytest.raises(UserError, match="no picture 30.jpg"):
        open_set(root, "train")


def test_captions_from_attributes_when_there_are_none(tmp_path):
    root = celeba_text(tmp_path, captions=False)
    train = open_set(root, "train")
    assert "attributes" in train.title and all(len(own) == 10 for own in train.captions)
    assert any("hat" in caption for caption in train.captions[0])
    assert not any(" she " in f" {caption} " or "woman" in caption for caption in train.captions[0])
    assert "plain face" in open_set(root, "test").captions[0][0]  # no attribute at all
    attributes = read_attributes(root / "CelebAMask-HQ-attribute-anno.txt")
    assert attributes["30"] == {"Bangs", "Young"}
    path = root / "CelebAMask-HQ-attribute-anno.txt"
    text(root / "data_flist" / "test.flist", "/data/celeba/images/face.jpg")
    path.write_text(path.read_text() + path.read_text().splitlines()[-1].replace("30.jpg", "face.jpg") + "\n")
    with pytest.raises(UserError, match="test.flist: face is no number of CelebA-HQ"):
        open_set(root, "test")
    path.write_text(path.read_text() + "99.jpg 1 -1\n")
    with pytest.raises(UserError, match="line 7"):
        read_attributes(path)


def test_the_grammar_names_what_is_there_and_nothing_else():
    every = celeba_captions({*NOUNS, *WORN, *STATES, "Male"}, 50, seed=0)
    assert len(set(every)) == 50 and celeba_captions({"Bangs"}, 3, 1) == celeba_captions({"Bangs"}, 3, 1)
    for caption in celeba_captions({"Bangs"}, 20, seed=2):
        assert ("bangs" in caption) != ("fringe" in caption)
        assert "wear" not in caption and "  " not in caption
    assert len({*NOUNS, *WORN, *STATES}) == 38  # the forty without Blurry and Male


def test_the_release_layout_and_its_ids(tmp_path):
    for i in (10, 2, 5):
        text(tmp_path / "data" / "train_caps2" / f"{i}.txt", f"face {i}")
    text(tmp_path / "data" / "test_caps2" / "3.txt", "face 3")
    assert find_layout(tmp_path) == "anyface"
    train = open_set(tmp_path, "train")
    assert train.names == ["2", "5", "10"] and train.captions[2] == ["face 10"]
    with pytest.raises(UserError, match="no picture of face 2"):
        train.picture(0, 8)
    latents = torch.randn(11, 18, 512)
    torch.save(latents, tmp_path / "latents.pt")
    assert torch.equal(read_codes(None, train.names, tmp_path), latents[[2, 5, 10]])
    with pytest.raises(UserError, match="no code of face 99"):
        read_codes(tmp_path / "latents.pt", ["2", "99"])


def test_the_picture_list_of_the_successor(tmp_path):
    names = [f"set{i % 2}/{i}" for i in range(20)]
    for name in names:
        picture(tmp_path / "data_all" / f"{name}.jpg", size=8)
        text(tmp_path / "captions_all" / f"{name}.txt", f"a face called {name}")
        (tmp_path / "latents_all" / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((1, 18, 4), float(name.split("/")[1])), tmp_path / "latents_all" / f"{name}.pt")
    text(tmp_path / "data_all" / "face.txt", *(f"{name}.jpg" for name in names))
    train, test = open_set(tmp_path, "train"), open_set(tmp_path, "test")
    assert len(train) == 18 and test.names == [names[9], names[19]]
    assert read_codes(None, test.names, tmp_path)[:, 0, 0].tolist() == [9, 19]
    (tmp_path / "data_all" / "set0" / "4.jpg").unlink()
    with pytest.raises(UserError, match="set0/4.jpg"):
        open_set(tmp_path, "train")


def test_unknown_roots_are_told_every_layout(tmp_path):
    for call in (lambda: open_set(tmp_path / "none", "train"), lambda: find_layout(tmp_path)):
        with pytest.raises(UserError) as error:
            call()
        assert all(
            word in str(error.value) for word in ("filenames.pickle", "data_flist", "train_caps", "face.txt")
        )
    for layout, missing in (("face-list", "face.txt"), ("celebatext-hq", "train.flist")):
        with pytest.raises(UserError, match=f"{missing}: no such list; expected"):
            open_set(tmp_path, "train", layout)
    text(tmp_path / "0.txt", "x")
    (tmp_path / "1.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_captions(tmp_path / "1.txt")


def test_codes_by_name(tmp_path):
    codes = torch.randn(3, 8, 4)
    path = tmp_path / "codes.safetensors"
    write_codes(path, ["a", "b/c", "d"], codes)
    assert torch.equal(read_codes(path, ["d", "a"]), codes[[2, 0]])
    with pytest.raises(UserError, match="no code of face x"):
        read_codes(path, ["x"])
    with pytest.raises(ValueError, match="distinct"):
        write_codes(path, ["a", "a", "b"], codes)
    save_file({"codes": codes}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="foreign.safetensors"):
        read_codes(tmp_path / "foreign.safetensors", ["a"])
    with pytest.raises(UserError, match="anyface.codes"):
        read_codes(None, ["a"], tmp_path / "empty")


# --- features and draws --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    generator = small_generator()
    config = replace(PRESETS["demo"], train_faces=12, test_faces=6)
    faces = open_faces(config, "train", generator)
    cache = build_cache(faces, clip, tokenizer, generator, "correct", torch.device("cpu"), batch=5)
    return clip, tokenizer, generator, config, faces, cache


def test_the_cache_holds_what_a_plain_loop_computes(small):
    clip, tokenizer, generator, _, faces, cache = small
    from anyface.clip import image_features, text_features

    with torch.no_grad():
        for i in (0, 7, 11):
            alone = image_features(clip, generator.synthesis(faces.codes[i : i + 1]))[0]
            assert torch.allclose(cache.image[i], alone, atol=1e-5)
            words = text_features(clip, tokenizer(faces.captions[i]))
            assert torch.allclose(cache.text[i], words, atol=1e-5)
    assert torch.equal(cache.mean, faces.codes.mean(0, keepdim=True))
    repeated = encode_captions(clip, tokenizer, ["a face", "a hat", "a face"], torch.device("cpu"))
    assert torch.equal(repeated[0], repeated[2])


def test_a_mismatched_caption_is_never_the_faces_own(small):
    cache = small[-1]
    for step in range(40):
        batch = draw_pairs(cache, [(i, 12 * step + i) for i in range(12)], 0, step, "sample")
        assert (batch["face"] != batch["other"]).all()
    again = draw_pairs(cache, [(i, 12 * 39 + i) for i in range(12)], 0, 39, "sample")
    assert all(torch.equal(again[k], batch[k]) for k in batch)
    others = {tuple(draw_pairs(cache, [(3, s)], 0, s, "sample")["other"].tolist()) for s in range(200)}
    assert len(others) == 11  # every other face turns up
    halves = [cut(batch, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat([half["f_t"] for half in halves]), batch["f_t"])


def test_caption_choice():
    counts = [10] * 30 + [3]
    faces = np.array([0, 7, 23, 30])
    assert choose_captions(counts, faces, np.zeros(4), 0, "id").tolist() == [0, 7, 3, 0]
    draws = np.arange(6000)
    chosen = choose_captions(counts, np.full(6000, 5), draws, 0, "sample")
    assert (abs(np.bincount(chosen, minlength=10) - 600) < 100).all()  # uniform over the ten
    assert (choose_captions(counts, np.full(6000, 30), draws, 0, "sample") < 3).all()
    part = choose_captions(counts, np.full(10, 5), np.arange(100, 110), 0, "sample")
    assert part.tolist() == chosen[100:110].tolist()
    with warnings.catch_warnings():  # the hash wraps around on purpose, and says nothing about it
        warnings.simplefilter("error")
        others = choose_captions(counts, np.full(6000, 5), draws, 7, "sample")
    assert 300 < (others == chosen).sum() < 900  # another seed, other draws: one in ten agrees


def test_the_released_choice_goes_by_the_number_a_face_is_called_by(small, mm_celeba):
    """Line id mod 10, wherever in its part of the set the face stands."""
    clip, _, generator, config, _, _ = small
    write_codes(mm_celeba / "codes.safetensors", [str(i) for i in range(5)], torch.randn(5, 8, 64))
    faces = open_faces(replace(config, data="auto", data_root=mm_celeba), "train", generator)
    assert faces.names == ["0", "3", "1"]
    tokenizer = WordTokenizer.from_captions([line for own in faces.captions for line in own], 28)
    known = (clip, tokenizer, generator, "correct", torch.device("cpu"))
    cache = build_cache(faces, *known, words=True)
    batch = draw_pairs(cache, [(row, row) for row in range(3)], 0, 0, "id")
    wanted = tokenizer([f"caption {number} of face {number}" for number in (0, 3, 1)])
    assert torch.equal(batch["tokens"], wanted)
    others = [int(faces.names[row]) for row in batch["other"].tolist()]
    assert torch.equal(batch["tokens_other"], tokenizer([f"caption {k} of face {k}" for k in others]))
    assert face_ids(["12", "a/7", "5"]).tolist() == [12, 1, 5]


def test_test_faces_are_others_and_codes_must_fit(small, mm_celeba):
    _, _, generator, config, faces, _ = small
    test = open_faces(config, "test", generator)
    assert len(test) == 6 and not torch.equal(test.codes[0], faces.codes[0])
    write_codes(mm_celeba / "codes.safetensors", [str(i) for i in range(5)], torch.randn(5, 8, 64))
    real = open_faces(replace(config, data="auto", data_root=mm_celeba), "train", generator)
    assert len(real) == 3 and real.picture(torch.tensor([1, 2]), 32).shape == (2, 3, 32, 32)
    write_codes(mm_celeba / "codes.safetensors", [str(i) for i in range(5)], torch.randn(5, 18, 512))
    with pytest.raises(UserError, match="do not fit a generator of 32 px"):
        open_faces(replace(config, data="auto", data_root=mm_celeba), "train", generator)


def test_codes_are_made_from_pictures_or_named(mm_celeba, tmp_path, capsys):
    torch.manual_seed(0)
    generator, (clip, _) = small_generator(), small_clip()
    torch.save({"g_ema": generator.state_dict(), "latent_avg": torch.zeros(64)}, tmp_path / "g.pt")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    out = tmp_path / "codes.safetensors"
    weights = {"generator_weights": tmp_path / "g.pt", "clip_weights": tmp_path / "clip.pt"}
    main(CodesOptions(data_root=mm_celeba, **weights, steps=1, out=out, device="cpu"))
    found = read_codes(out, ["4", "0"])
    assert found.shape == (2, 8, 64) and found.isfinite().all()
    said = capsys.readouterr().err
    assert "5 of 5 faces are reproduced to less than 50 %" in said
    # What the inversion remarks on is not lost: every face's remarks stand in a file that is named.
    listed = out.with_suffix(".warnings.txt")
    assert f"5 of 5 faces came with remarks, listed in {listed}" in said
    lines = listed.read_text("utf-8").splitlines()
    assert len({line.split(":")[0] for line in lines}) == 5
    assert any("of this picture's variance" in line or "of one colour" in line for line in lines)
    with pytest.raises(UserError, match="--generator-weights"):
        main(CodesOptions(data_root=mm_celeba, out=out))
    # A face that both parts list is inverted once.
    (mm_celeba / "test" / "filenames.pickle").write_bytes(pickle.dumps(["2", "4", "1"]))
    main(CodesOptions(data_root=mm_celeba, **weights, steps=1, out=out, device="cpu"))
    assert read_codes(out, ["0", "1", "2", "3", "4"]).shape == (5, 8, 64)

    torch.save(torch.randn(2, 18, 512), tmp_path / "latents.pt")
    text(tmp_path / "names.txt", "a/17.jpg", "b/4.jpg")
    main(CodesOptions(latents=tmp_path / "latents.pt", names=tmp_path / "names.txt", out=out))
    assert read_codes(out, ["4", "17"]).shape == (2, 18, 512)
    # The successor's faces are called by their paths.
    main(
        CodesOptions(
            latents=tmp_path / "latents.pt", names=tmp_path / "names.txt", out=out, layout="face-list"
        )
    )
    assert read_codes(out, ["b/4", "a/17"]).shape == (2, 18, 512)
    with pytest.raises(UserError, match="^--steps -1"):
        parse(CodesOptions, "", ["--steps", "-1"])
    text(tmp_path / "names.txt", "17.jpg")
    with pytest.raises(UserError, match="1 names, 1 different, for 2 codes"):
        main(CodesOptions(latents=tmp_path / "latents.pt", names=tmp_path / "names.txt", out=out))
