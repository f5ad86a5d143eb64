"""AnyFace: metrics against closed forms and slow references, baselines, claims, the user study."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from anyface.baselines import nearest_caption, optimise_codes
from anyface.claims import code_claims, picture_claims
from anyface.clip import image_features
from anyface.compare import compare, draw_diversity, make_methods, paint
from anyface.data import Cache, Faces, build_cache
from anyface.effects import collapse_index, editing, kept_identity, named_accuracy, spread
from anyface.judges import Judge, accuracy, read, split_heads
from anyface.muon import Muon, orthogonalise
from anyface.parts import small_clip, small_generator, teach_mapping, wide_learner, widen
from anyface.protocol import (
    Networks,
    Tally,
    clip_score,
    diversity,
    face_rates,
    feature_diversity,
    feature_networks,
    look,
    mean_rank,
    measure,
    own_ranks,
    r_precision,
    read_rows,
    rfrr,
)
from anyface.stages import Constants, make_streams
from anyface.train import PRESETS
from anyface.userstudy import StudyOptions, print_study, read_study, write_study
from anyface.world import TRAITS, make_world, read_traits, unit
from shared.published import load_published
from shared.runtime import UserError


@pytest.fixture(scope="module")
def constants() -> Constants:
    torch.manual_seed(0)
    clip, tokenizer = small_clip()
    networks = (clip, small_generator(), Judge())
    for network in networks:
        network.eval().requires_grad_(False)
    return Constants(clip, tokenizer, networks[1], judge=networks[2])


def random_cache(faces: int, captions: int, seed: int = 0) -> Cache:
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randn(faces, 8, 64, generator=rng)
    counts = np.full(faces, captions)
    counts[0] = 1
    text = torch.randn(faces, captions, 64, generator=rng)
    text[0, 1:] = 0
    return Cache(codes, torch.randn(faces, 64, generator=rng), text, counts, codes.mean(0, keepdim=True))


def test_ranks_are_those_of_a_plain_loop():
    rng = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 20, 5, generator=rng)
    expected = []
    for i in range(20):
        scores = [F.cosine_similarity(a[i], b[j], dim=0).item() for j in range(20)]
        expected.append(1 + sum(score > scores[i] + 1e-7 for score in scores))
    assert own_ranks(a, b, rivals=19).tolist() == expected
    assert r_precision(a, a) == 1.0
    assert (
        own_ranks(torch.ones(9, 3), torch.ones(9, 3), rivals=4).tolist() == [3.0] * 9
    )  # all tied: the middle


def test_rivals_are_drawn_without_the_own_caption():
    keys = torch.eye(30)
    queries = torch.roll(keys, 1, 0)  # every query is nearest to another's key, and 0 to the rest
    ranks = own_ranks(queries, keys, rivals=29)
    assert (ranks == 2 + 28 / 2).all()
    few = own_ranks(queries, keys, rivals=5)
    assert set(few.tolist()) <= {1 + 5 / 2, 2 + 4 / 2} and len(set(few.tolist())) == 2


def test_mean_rank_is_one_for_aligned_and_chance_for_foreign_features():
    rng = torch.Generator().manual_seed(2)
    a = torch.randn(200, 16, generator=rng)
    assert mean_rank(a + 7, 3 * a - 5) == 1.0  # centred, so offset and scale do not matter
    assert 85 < mean_rank(a, torch.randn(200, 16, generator=rng)) < 116


def test_clip_score_and_diversity_in_closed_form():
    a = torch.tensor([[1.0, 0], [1, 0]])
    b = torch.tensor([[1.0, 1], [-1, 0]])
    assert clip_score(a, b) == pytest.approx(100 * (0.5**0.5) / 2, abs=1e-4)
    draws = torch.tensor([0.0, 1.0, 3.0]).view(3, 1, 1, 1, 1).expand(3, 2, 3, 4, 4)
    assert diversity(draws) == pytest.approx((1 + 3 + 2) / 3)


class Apart(torch.nn.Module):
    """Stand-in for LPIPS: the mean difference of two pictures in [-1, 1]."""

    def forward(self, a, b):
        assert a.shape[-1] == 256
        return (a - b).abs().mean((1, 2, 3))


def test_diversity_of_draws_as_networks_see_them(constants):
    rng = torch.Generator().manual_seed(5)
    draws = (2 * torch.rand(3, 70, 3, 32, 32, generator=rng) - 1) * torch.tensor([1, 1, 0.2]).view(
        3, 1, 1, 1, 1
    )
    given = Networks(feature_networks(constants.clip, "correct", None, None))
    row = feature_diversity(draws, given)
    assert set(row) == {"CLIP"}
    seen = [image_features(constants.clip, own) for own in draws]
    apart = [1 - F.cosine_similarity(seen[i], seen[j]).mean().item() for i, j in ((1, 0), (2, 0), (2, 1))]
    assert row["CLIP"] == pytest.approx(sum(apart) / 3, abs=1e-5) and row["CLIP"] > 1e-4
    flat = torch.tensor([0.0, 0.5, 0.8]).view(3, 1, 1, 1, 1).expand(3, 70, 3, 8, 8)
    row = feature_diversity(flat, replace(given, lpips=Apart()))
    assert row["LPIPS"] == pytest.approx((0.5 + 0.8 + 0.3) / 3, abs=1e-5)


def test_edits_keep_the_more_of_an_identity_the_higher_the_degree(constants):
    class Identity:
        def embed(self, pictures):
            return pictures.flatten(1)

    rng = torch.Generator().manual_seed(4)
    w, w_t = torch.randn(2, 9, 8, 64, generator=rng)
    kept = kept_identity(w, w_t, constants.generator, Identity(), count=5, batch=2)
    assert list(kept) == [0, 2, 4, 6, 8] and kept[8] == pytest.approx(1, abs=1e-5) and kept[0] < 0.99
    made = constants.generator.synthesis(torch.cat((w[:5, :4], w_t[1:6, 4:]), 1)).flatten(1)
    wanted = F.cosine_similarity(made, constants.generator.synthesis(w[:5]).flatten(1)).mean().item()
    assert kept[4] == pytest.approx(wanted, abs=1e-4)
    at_1024 = type("G", (), {"n_latent": 18, "synthesis": staticmethod(lambda codes: codes)})
    assert list(kept_identity(*torch.randn(2, 2, 18, 4), at_1024, Identity())) == [0, 3, 6, 9, 12, 15, 18]


def test_draws_of_the_evaluation_are_truncated_as_asked(constants, monkeypatch):
    config, mean = PRESETS["demo"], torch.randn(1, 8, 64)
    w_t, networks = torch.randn(5, 8, 64), Networks(feature_networks(constants.clip, "correct", None, None))
    known = (constants, config)
    loose, tight = (draw_diversity(w_t, *known, psi, mean, networks) for psi in (1.0, 0.0))
    assert set(loose) == set(tight) == {"L1", "CLIP"} and min(loose.values()) > 1e-5
    assert tight["L1"] == 0 and tight["CLIP"] < 1e-6
    monkeypatch.setattr("anyface.compare.BATCH", 2)
    assert draw_diversity(w_t, *known, 1.0, mean, networks) == pytest.approx(loose, rel=1e-4)


def test_rfrr_splits_ties_and_sums_to_one():
    near = {
        "a": torch.tensor([0.9, 0.5, 0.1]),
        "b": torch.tensor([0.1, 0.5, 0.2]),
        "c": torch.tensor([0, 0.5, 0]),
    }
    shares = rfrr(near)
    assert shares == pytest.approx({"a": (1 + 1 / 3) / 3, "b": (1 + 1 / 3) / 3, "c": (1 / 3) / 3})
    with pytest.raises(ValueError, match="two methods"):
        rfrr({"a": near["a"]})


def tally_of(pictures: torch.Tensor, networks: Networks) -> Tally:
    tally = Tally()
    for part in pictures.split(13):
        tally.add(look(part, networks), {"mean": part.mean().item()}, len(part))
    return tally


def test_frechet_distances_are_named_after_their_network_and_tell_sets_apart(constants):
    networks = Networks(feature_networks(constants.clip, "correct", None, constants.judge))
    truth = make_world(40, 3, per_face=1).pictures()
    texts = {"CLIP": image_features(constants.clip, truth)}
    photos, negatives = tally_of(truth, networks), tally_of(-truth, networks)
    same, other = (measure(tally, photos, texts) for tally in (photos, negatives))
    # never called FID without Inception
    named = {"frechet_clip", "frechet_judge"}
    assert {name for name in same if "frechet" in name or "FID" in name} == named
    assert same["R-precision@1"] == 100 and same["CLIP score"] > 99.99
    assert same["mean"] == pytest.approx(truth.mean().item(), abs=1e-5)
    for name in named:
        assert abs(same[name]) < 1e-3 and other[name] > 1e-2
    shares = face_rates({"same": photos, "other": negatives}, photos)
    assert shares == {"RFRR (judge's features)": {"same": 1.0, "other": 0.0}}
    assert face_rates({}, tally_of(truth, Networks({}))) == {}  # no network for faces


def test_fid_needs_its_weights(constants, tmp_path):
    with pytest.raises(UserError, match="weights-inception"):
        feature_networks(constants.clip, "correct", tmp_path / "none.pth", None)


def test_the_comparison_keeps_a_batch_of_pictures_alone(constants, monkeypatch):
    """However many captions are compared, no method is asked for more pictures at once; the numbers do not
    depend on the batch."""
    world = make_world(10, 3, per_face=1)
    faces = Faces("drawn", list("abcdefghij"), world.captions, torch.randn(10, 8, 64), world.pictures)
    known = (constants.clip, constants.tokenizer, constants.generator, "correct", torch.device("cpu"))
    cache = build_cache(faces, *known)
    streams = {"full": {0: make_streams(PRESETS["demo"], constants, 0)}}
    methods = make_methods(PRESETS["demo"], streams, constants, (faces, cache), cache, 7, 1.0, 0)
    assert list(methods) == [
        *("full", "full, noise", "mean face", "own code (upper bound)", "nearest training caption")
    ]
    asked = []

    def watched(name):
        return lambda index: asked.append(len(index)) or methods[name](index)

    networks = Networks(feature_networks(constants.clip, "correct", None, constants.judge), lpips=Apart())
    given = ({name: watched(name) for name in methods}, faces, {"CLIP": cache.text[:7, 0]}, networks)
    rows = compare(*given, constants.judge)
    assert asked == [7] * 5
    monkeypatch.setattr("anyface.compare.BATCH", 3)
    asked.clear()
    small = compare(*given, constants.judge)
    assert asked == [3] * 10 + [1] * 5
    for name, row in rows.items():
        assert small[name] == pytest.approx(row, rel=1e-3, abs=1e-3)
    made = paint(cache.codes[:7], constants.generator)
    own, true = rows["own code (upper bound)"], world.pictures(torch.arange(7))
    assert own["L1 to truth"] == pytest.approx((made - true).abs().mean().item(), abs=1e-5)
    assert own["LPIPS"] == pytest.approx(own["L1 to truth"], rel=0.1)
    seen = read(constants.judge, made)
    captions = [own[0] for own in faces.captions[:7]]
    assert own["named traits"] == pytest.approx(100 * named_accuracy(seen, captions))
    assert "RFRR (judge's features)" in rows["full"] and "RFRR (judge's features)" not in own


def test_collapse_and_spread():
    rng = torch.Generator().manual_seed(3)
    w, mean = torch.randn(50, 8, 64, generator=rng), torch.randn(1, 8, 64, generator=rng)
    assert collapse_index(w, w, mean) == pytest.approx(1)
    assert collapse_index(mean.expand(50, -1, -1) * 3, w, mean) == pytest.approx(0, abs=1e-5)
    assert spread(w, w) == pytest.approx(1) and spread(mean.expand(50, -1, -1), w) == 0


def test_judge_reads_every_trait_and_named_ones_are_counted():
    seen = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    assert named_accuracy(seen, ["a person with short hair and a hat"]) == 1.0
    assert named_accuracy(seen, ["a person with long hair and a hat"]) == 0.5
    assert named_accuracy(seen, ["someone has blond hair, pale skin and no hat"], coarse=True) == 0.0
    assert accuracy(seen, torch.tensor([[0, 1, 2, 0, 1, 1, 0]])) == pytest.approx(5 / 7)
    judge = Judge()
    assert [head.shape[1] for head in split_heads(judge(torch.zeros(2, 3, 32, 32)))] == [
        len(trait.shares) for trait in TRAITS
    ]
    assert read(judge, torch.zeros(2, 3, 64, 64)).shape == (2, 7)  # other sizes are resized


def test_nearest_caption_ignores_empty_rows():
    cache = random_cache(12, 4)
    queries = torch.stack([cache.text[i, min(i % 4, cache.counts[i] - 1)] * 5 for i in range(12)])
    assert nearest_caption(queries, cache).tolist() == list(range(12))
    assert nearest_caption(torch.zeros(1, 64) - cache.text[0, 0], cache).item() != 0


def test_latent_optimisation_comes_nearer_to_the_caption(constants):
    cache = random_cache(4, 1)
    texts = cache.text[:, 0]
    codes = optimise_codes(texts, constants.generator, constants.clip, cache.mean, steps=8, batch=2)
    assert codes.shape == (4, 8, 64)
    start = image_features(constants.clip, constants.generator.synthesis(cache.mean)).expand(4, -1)
    end = image_features(constants.clip, constants.generator.synthesis(codes))
    assert clip_score(end, texts) > clip_score(start, texts)
    near = optimise_codes(texts, constants.generator, constants.clip, cache.mean, steps=8, lambda_l2=10.0)
    assert (near - cache.mean).norm() < 0.5 * (codes - cache.mean).norm()
    together = optimise_codes(texts, constants.generator, constants.clip, cache.mean, steps=3, batch=4)
    apart = optimise_codes(texts, constants.generator, constants.clip, cache.mean, steps=3, batch=1)
    assert torch.allclose(together, apart, atol=1e-4)  # every caption is optimised as if alone


def test_editing_has_exact_ends(constants):
    text, _ = make_streams(PRESETS["demo"], constants, 0)
    result = editing(text, random_cache(6, 2), constants)
    assert len(result["L1"]) == constants.generator.n_latent + 1
    assert result["L1"][-1] == 0 and result["first end"] == [0] and result["last end"] == [0]
    assert result["L1"][0] > 0


def test_claims_fail_for_broken_builds():
    good = {"full": {0: {"collapse index": 1.2, "spread": 0.8, "rank": 60.0}}}
    good["no-dt"] = {0: {"collapse index": 0.1, "spread": 0.2, "rank": 60.0}}
    good["no-cmd"] = {0: {"collapse index": 1.2, "spread": 0.8, "rank": 110.0}}
    assert [claim.holds for claim in code_claims(good)] == [True] * 3
    assert [claim.holds for claim in code_claims({**good, "full": good["no-dt"]})] == [False, False, True]
    unaligned = {**good, "full": good["no-cmd"]}
    assert [claim.holds for claim in code_claims(unaligned)] == [True, True, False]
    two = {k: {0: v[0], 1: v[0]} for k, v in good.items()}
    two["full"] = {0: good["full"][0], 1: good["no-cmd"][0]}
    assert not code_claims(two)[2].holds  # every seed for itself

    seen = {"accuracy": 0.65, "shuffled captions": 0.44, "mean face": 0.43, "true codes": 0.76, "fine": 0.6}
    seen |= {"fine with noise": 0.58, "difference of draws": 0.15, "difference without noise": 0.0}
    seen |= {"unseen": 0.6, "unseen, shuffled": 0.44, "all traits": 0.57}
    seen |= {"all traits, shuffled captions": 0.44, "all traits, mean face": 0.45}
    edit = {"L1": [0.3, 0.2, 0.0], "cosine": [0.5, 0.3, 0.2], "first end": [0.0], "last end": [0.0]}
    counts = [0.44, 0.5, 0.58, 0.63]
    assert all(claim.holds for claim in picture_claims(seen, 0.4, edit, counts))
    ignored = {**seen, "accuracy": 0.6, "shuffled captions": 0.6}  # the text does not matter
    broken = [
        picture_claims(ignored, 0.4, edit, counts)[0],
        picture_claims({**seen, "all traits, mean face": 0.5}, 0.4, edit, counts)[0],
        picture_claims(seen, 0.1, edit, counts)[1],
        picture_claims({**seen, "fine with noise": 0.44}, 0.4, edit, counts)[2],
        picture_claims({**seen, "difference without noise": 1e-4}, 0.4, edit, counts)[2],
        picture_claims(seen, 0.4, {**edit, "L1": [0.3, 0.35, 0.0]}, counts)[3],
        picture_claims(seen, 0.4, edit, [0.6] * 4)[4],
        picture_claims({**seen, "unseen": 0.5}, 0.4, edit, counts)[5],
    ]
    assert not any(claim.holds for claim in broken)


def test_the_wide_generator_begins_as_the_small_one_and_keeps_its_mapping():
    torch.manual_seed(0)
    small, wide = small_generator().requires_grad_(False), small_generator(64)
    learner = wide_learner(wide, small, 2, 0, torch.device("cpu"))
    for name, value in small.state_dict().items():
        if not name.startswith("noises"):
            assert torch.equal(wide.state_dict()[name], value), name
    sum(learner.terms(0).values()).backward()
    with_gradient = {name for name, p in wide.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in wide.named_parameters() if not name.startswith("style")}
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    learner.optimiser.step()
    kept = {name for name, value in wide.state_dict().items() if torch.equal(value, before[name])}
    assert kept >= {f"style.{name}" for name in small.style.state_dict()}
    assert "convs.0.conv.weight" not in kept
    codes = torch.randn(2, 8, 64)
    assert torch.equal(widen(codes, 10)[:, 8], codes[:, 7]) and widen(codes, 8).shape == codes.shape


def test_the_taught_mapping_keeps_the_traits_apart():
    torch.manual_seed(0)
    generator = small_generator(16)
    z = unit(torch.randn(2, 2000, 64, generator=torch.Generator().manual_seed(1)))
    values = read_traits(*z)

    def told() -> float:
        """Worst share of test vectors whose trait a least-squares reader tells from w, over the traits."""
        shares = []
        for t, trait in enumerate(TRAITS):
            w = generator.mapping(z[0 if trait.coarse else 1]).detach()
            w = torch.cat((w, torch.ones(len(w), 1)), 1)
            wanted = torch.nn.functional.one_hot(values[:, t]).float()
            reader = torch.linalg.lstsq(w[:1000], wanted[:1000]).solution
            shares.append(((w[1000:] @ reader).argmax(1) == values[1000:, t]).float().mean().item())
        return min(shares)

    before = told()
    teach_mapping(generator, 200, seed=0)
    assert told() > before + 0.15
    assert generator.mapping(z[0]).std(0).square().mean().sqrt().item() == pytest.approx(1, abs=0.15)


def test_muon_steps_are_of_one_size_in_all_directions():
    torch.manual_seed(0)
    matrix = torch.randn(8, 30)
    assert (torch.linalg.svdvals(orthogonalise(matrix, steps=8)) - 1).abs().max() < 0.35
    assert torch.equal(orthogonalise(matrix.T), orthogonalise(matrix).T)
    kernel, bias = torch.nn.Parameter(torch.randn(1, 4, 6, 3, 3)), torch.nn.Parameter(torch.randn(5))
    before = kernel.detach().clone()
    optimiser, adam = Muon([kernel, bias], lr=0.02), torch.nn.Parameter(bias.detach().clone())
    plain = torch.optim.Adam([adam], 0.02, betas=(0.9, 0.99))
    for step in range(3):
        kernel.grad, bias.grad = torch.randn_like(kernel), torch.randn(5)
        adam.grad = bias.grad.clone()
        optimiser.step(), plain.step()
        if step == 0:
            assert (kernel - before).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-3)
        assert torch.allclose(bias, adam, atol=1e-6)
    again = Muon([kernel, bias], lr=0.02)
    again.load_state_dict(optimiser.state_dict())
    assert again.state_dict()["state"][1]["step"] == 3


def test_user_study_is_blind_and_its_key_gives_the_methods_back(tmp_path, capsys):
    methods = {name: torch.full((3, 3, 8, 8), level) for name, level in (("AnyFace", 0.5), ("MSE", -0.5))}
    page = write_study(tmp_path / "study", ["a <b>", "two", "three"], methods, seed=0)
    text = page.read_text()
    assert "AnyFace" not in text and "MSE" not in text and "a &lt;b&gt;" in text
    with open(tmp_path / "study" / "key.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row in rows:
        name = tmp_path / "study" / f"q{int(row['question']):03d}_{row['position']}.png"
        with Image.open(name) as picture:
            assert picture.getpixel((0, 0))[0] == (191 if row["method"] == "AnyFace" else 64)
            assert "synthetic" in picture.text["Description"] and row["method"] not in str(picture.text)
    answers = {f"q{r['question']}_{r['position']}_fit": "1" if r["method"] == "MSE" else "2" for r in rows}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    ranks = read_study(tmp_path / "study" / "key.csv", [tmp_path / "answers.json"])
    assert ranks == {"AnyFace": {"fit": 2.0}, "MSE": {"fit": 1.0}}
    study = StudyOptions((tmp_path / "answers.json",), key=tmp_path / "study" / "key.csv")
    print_study(study)
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()[-2:]] == [
        ["AnyFace", "2.00", "-"],
        ["MSE", "1.00", "-"],
    ]
    for content in (
        '{"q0_7_fit": "1"}',
        '{"q0_1_fit": "3"}',
        '{"q0_1_fit": "-7"}',
        '{"name": "1"}',
        "no json",
        "[1]",
    ):
        (tmp_path / "answers.json").write_text(content)
        with pytest.raises(UserError, match="answers.json: not readable as answers to this study"):
            print_study(study)
    with pytest.raises(UserError, match="nothing.csv: no key"):
        print_study(StudyOptions((tmp_path / "answers.json",), key=tmp_path / "nothing.csv"))


def test_rows_that_the_user_holds_keep_their_protocol(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('method,dataset,metric,value,protocol\nX,CelebA,FID,50.5,"6,000 pictures, 256 px"\n')
    assert read_rows(path) == [
        {
            "method": "X",
            "dataset": "CelebA",
            "metric": "FID",
            "value": 50.5,
            "protocol": "6,000 pictures, 256 px",
        }
    ]
    for content, message in (
        ("method,metric\nX,FID\n", "no column dataset, protocol, value"),
        ("method,dataset,metric,value,protocol\nX,C,FID,low,P\n", "line 2: 'low' is no number"),
        ("method,dataset,metric,value,protocol\nX,C,FID,1,\n", "line 2: protocol is empty"),
        ("method,dataset,metric,value,protocol\n", "no rows"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            read_rows(path)
    with pytest.raises(UserError, match="none.csv: no such file"):
        read_rows(tmp_path / "none.csv")


def test_no_anyface_number_is_published():
    published = load_published("anyface")
    assert "no row here is a result of AnyFace" in published["note"]
    assert not any(row["method"].lower().startswith("anyface") for row in published["rows"])
