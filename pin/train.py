"""Train PIN: eigenfaces, denoising autoencoder, eigenvector selection network; and the demo's recognisers.

`demo` draws its own people. `study` is the demo with every variant, `two-populations` the demo with half of
the people transposed, `real` the demo's recipe on a small folder of real faces. `paper` has the official
values, `calibrated` a lambda of ours and the exact gradient; both need --data-root and train no recogniser.

Stages, each resumable and skipped when its result is there: basis, dae, one ESN per variant, recognisers.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from pin.basis import Basis, load_basis, pick_solver
from pin.data import identity_folder, training_faces
from pin.figures import purification_sheet
from pin.immune import make_ais, train_ais
from pin.job import Job, placed, set_rate
from pin.losses import add_noise, calibrate_lambda, distill, exact, mask_cost, mask_entropy, reinforce
from pin.model import DAE, PIN, make_esn
from pin.recognition import train_recognizer
from pin.recognizers import SmallRecognizer
from shared.io import Run
from shared.processes import as_one, gathered
from shared.ranges import Count, Natural, Positive, Share, Weight
from shared.runtime import LoaderConfig, UserError, maybe_compile, run_training, start, step_generator

DAE_NOISE, ESN_NOISE, LAMBDA_IMAGES, LAMBDA_NOISE = 1, 2, 3, 4  # streams of randomness of their own
DemoRecognizer = Literal["recognizer", "surrogate", "robust"]


@dataclass(frozen=True)
class Config(LoaderConfig):
    """Settings of the data, the defence and the demo's recognisers."""

    # --- data ---
    data: Literal["simple", "faces", "folder", "celeba"] = "simple"
    """Training images: embedded cartoons, embedded shaded faces, root/<person>/<image>, or CelebA."""
    data_root: Path | None = None
    """Folder of the images for `folder` and `celeba`."""
    basis_root: Path | None = None
    """Identity folder for the eigenfaces when it is another one (officially LFW)."""
    basis: Path | None = None
    """Ready eigenfaces instead of computing them: our basis.safetensors or the official .pth."""
    landmarks: Path | None = None
    """List of five landmarks per image: crops are then moved to ArcFace's template."""
    size: Count = 32
    """Side of the square grey images, in pixels."""
    people: Count = 90
    """Embedded data: people to train on."""
    images_per_person: Count = 30
    """Embedded data: training images of each."""
    test_people: Count = 30
    """Embedded data: other people to test on."""
    test_images: Count = 16
    """Embedded data: test images of each."""
    transposed: Share = 0.0
    """Embedded data: share of people shown transposed, a second population with its own eigenfaces."""

    # --- eigenfaces ---
    components: Count = 256
    """Eigenfaces in the basis, K."""
    solver: Literal["auto", "covariance", "gram", "randomized"] = "auto"
    """How to compute them. auto: gram when there are fewer images than pixels, covariance otherwise."""
    basis_batch: Count = 256
    """Images per block of the pass over the data."""

    # --- networks ---
    dae_widths: tuple[Count, ...] = (8, 16)
    """Channels of the DAE's levels, each half the size of the one before."""
    second_stage: Literal["shared", "separate"] = "shared"
    """DAE: run the first stage twice (official), or train a second one."""
    dae: bool = True
    """Whether the ESN sees the DAE's output or the noisy image itself."""
    esn_widths: tuple[Count, ...] = (16, 32, 64)
    """Channels of the ESN's levels, two blocks each."""
    hidden: Count = 128
    """Width of the ESN's hidden layer."""

    # --- noise and objective ---
    noise: Weight = 0.04
    """Length of the noise as a share of the image's."""
    noise_norm: Literal["batch", "image"] = "batch"
    """Lengths taken over the whole batch (official) or over each image."""
    estimator: Literal["reinforce", "exact", "distill"] = "reinforce"
    """Sampled policy gradient (official), its closed form, or cross-entropy to the oracle's mask."""
    baseline: Literal["batch", "image"] = "batch"
    """Baseline of the policy gradient: one for the batch (official) or one for each image."""
    samples: Count = 30
    """Masks per image, S."""
    lamb_sparse: Literal["auto"] | Weight = "auto"
    """Price lambda of one kept eigenface (official 0.015). auto: so that about `keep` of them pay."""
    keep: Count = 48
    """Eigenfaces to keep under `--lamb-sparse auto`, K*."""
    entropy: Weight = 0.0
    """Weight of an entropy bonus against saturated probabilities."""

    # --- optimisation ---
    dae_steps: Natural = 400
    """Training steps of the DAE."""
    dae_batch: Count = 64
    """Its batch size."""
    dae_rate: Positive = 1e-3
    """Its learning rate (Adam, cosine to a hundredth)."""
    dae_epochs: Natural = 0
    """Train the DAE for so many epochs instead of `dae_steps`."""
    esn_steps: Natural = 600
    """Training steps of each ESN."""
    esn_batch: Count = 32
    """Its batch size."""
    esn_epochs: Natural = 0
    """Train the ESN for so many epochs instead of `esn_steps`."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimiser of the ESN: SGD with momentum 0.9 (official) or Adam."""
    esn_rate: Positive = 0.01
    """Its learning rate."""
    halve_epochs: Natural = 0
    """Halve the ESN's rate every so many epochs, counted as the official code counts; 0 for never."""
    clip: Weight = 0.0
    """Clip the ESN's gradient to this norm; 0 for never."""
    variants: tuple[str, ...] = ("pin", "exact", "distill", "official-lambda")
    """ESNs to train on the same basis and DAE: keys of VARIANTS, each a change of these settings."""
    save_every: Count = 200
    """Steps between checkpoints."""
    log_every: Count = 50
    """Steps between log lines."""

    # --- recognisers of the demo ---
    recognizers: tuple[DemoRecognizer, ...] = ("recognizer", "surrogate", "robust")
    """Recognisers to train: the attacked one, a second one, and one hardened by adversarial training."""
    recognizer_epochs: Natural = 8
    """Epochs of each."""
    head: Literal["additive", "arcface"] = "additive"
    """Their margin softmax."""
    adversarial: Literal["pgd", "trades"] = "pgd"
    """How the robust one is trained."""
    adversarial_eps: Weight = 16 / 255
    """Its perturbations in [-1, 1]; 16/255 is 8 grey levels."""
    adversarial_steps: Natural = 3
    """Their PGD steps."""


VARIANTS: dict[str, dict] = {
    "pin": {},
    "image": {"baseline": "image", "optimizer": "adam", "esn_rate": 1e-3},
    "exact": {"estimator": "exact", "optimizer": "adam", "esn_rate": 1e-3},
    "distill": {"estimator": "distill", "optimizer": "adam", "esn_rate": 1e-3},
    "official-lambda": {"estimator": "exact", "optimizer": "adam", "esn_rate": 1e-3, "lamb_sparse": 0.015},
    "no-dae": {"dae": False},
    "samples-1": {"samples": 1},
    "samples-5": {"samples": 5},
    "noise-0.16": {"noise": 0.16},
    "entropy": {"entropy": 0.01},
    "ais": {"dae": False},
}
SWEEP = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2)
VARIANTS |= {
    f"lambda-{lamb:g}": {"estimator": "exact", "optimizer": "adam", "esn_rate": 1e-3, "lamb_sparse": lamb}
    for lamb in SWEEP
}

FULL = Config(
    data="folder",
    size=112,
    components=2500,
    dae_widths=(64, 128, 256),
    esn_widths=(64, 128, 256, 512),
    hidden=512,
    keep=1000,
    dae_epochs=200,
    esn_batch=20,
    esn_epochs=200,
    halve_epochs=20,
    lamb_sparse=0.015,
    variants=("pin",),
    recognizers=(),
    save_every=2000,
    workers=8,
)
PRESETS = {
    "demo": Config(),
    "study": Config(variants=tuple(VARIANTS)),
    "two-populations": Config(transposed=0.5),
    "paper": FULL,
    "calibrated": dataclasses.replace(
        FULL,
        lamb_sparse="auto",
        estimator="exact",
        optimizer="adam",
        esn_rate=1e-3,
        esn_batch=128,
        esn_epochs=10,
        dae_epochs=20,
    ),
    "real": Config(data="folder", components=200, recognizer_epochs=60),
}


def variant_config(config: Config, variant: str) -> Config:
    """The settings of a run for one of its ESNs."""
    return dataclasses.replace(config, **VARIANTS[variant])


def check_settings(config: Config) -> None:
    """UserError for settings that do not go together, before anything is computed."""
    if not config.dae_widths or not config.esn_widths:
        raise UserError("--dae-widths and --esn-widths: give the channels of at least one level")
    halved = 2 ** len(config.dae_widths)
    if config.size % halved:
        raise UserError(
            f"--size {config.size}: the DAE of {len(config.dae_widths)} levels needs multiples of {halved}"
        )
    if config.lamb_sparse == "auto" and config.keep > config.components:
        raise UserError(f"--keep {config.keep}: it must lie in 1..{config.components}, the --components")
    for name in ("variants", "recognizers"):
        if len(set(getattr(config, name))) < len(getattr(config, name)):
            raise UserError(f"--{name}: one of them is named twice")
    if "ais" in config.variants and "recognizer" not in config.recognizers:
        raise UserError("the variant ais needs a recogniser for its identity term: --recognizers recognizer")
    if config.basis is not None and config.basis_root is not None:
        raise UserError("--basis and --basis-root: eigenfaces are ready or computed; give one of them")


def build_networks(config: Config, classes: int) -> dict[str, nn.Module]:
    """Networks of a run by name in the checkpoint: dae where an ESN sees it, esn-<variant>, recognisers."""
    if unknown := [variant for variant in config.variants if variant not in VARIANTS]:
        raise UserError(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    networks: dict[str, nn.Module] = {}
    if any(variant_config(config, variant).dae for variant in config.variants):
        networks["dae"] = DAE(config.dae_widths, config.second_stage)
    for variant in config.variants:
        make = make_ais if variant == "ais" else make_esn
        networks[f"esn-{variant}"] = make(config.size, config.components, config.esn_widths, config.hidden)
    for name in config.recognizers:
        networks[name] = SmallRecognizer(config.size, classes)
    return networks


# --- stages ---------------------------------------------------------------------------------------


def make_basis(job: Job, faces: Dataset) -> Basis:
    """Stage `basis`: eigenfaces by one pass over the images (three when randomised), in bounded memory."""
    config, path = job.config, job.run.folder / "basis.safetensors"
    if not job.done("basis") and job.accelerator.is_main_process:
        if config.basis is not None:
            basis = load_basis(config.basis, config.components, config.size)
            basis.require_orthonormal()
        else:
            if config.basis_root is not None:
                faces = identity_folder(config.basis_root, config.size, config.landmarks)
            pixels = config.size**2
            solver = pick_solver(config.solver, len(faces), pixels, config.components, job.accelerator.device)
            per_pass = math.ceil(len(faces) / config.basis_batch)
            total = per_pass * solver.passes
            for step, (x, _) in job.steps(
                "basis", total, faces, config.basis_batch, in_order=True, solver=solver
            ):
                solver.add(x, step // per_pass)
            basis = solver.solve()
        basis.save(path)
    job.accelerator.wait_for_everyone()
    basis = load_basis(path, config.components)
    if not job.done("basis"):
        job.facts["basis"] = basis.fingerprint()
        job.finish("basis", 0)
    basis.check(job.facts["basis"], f"the checkpoint in {job.run.folder}")
    return basis.to(job.accelerator.device)


def train_dae(job: Job, faces: Dataset) -> None:
    """Stage `dae`: remove the ESN's own training noise, in both of the cascaded stages (our
    reconstruction)."""
    if job.done("dae") or "dae" not in job.networks:
        return
    config, dae = job.config, job.networks["dae"]
    model = job.accelerator.prepare(maybe_compile(placed(dae, job.accelerator.device), config.compile))
    trained = [parameter for parameter in dae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, config.dae_rate)
    total = config.dae_steps if not config.dae_epochs else config.dae_epochs * len(faces) // config.dae_batch
    for step, (x, _) in job.steps("dae", total, faces, config.dae_batch, optimizer=optimizer):
        set_rate(optimizer, config.dae_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * step / total)) / 2))
        noisy = add_noise(x, config.noise, job.generator(step, DAE_NOISE), config.noise_norm)
        with job.accelerator.autocast():
            x1, x2 = model(noisy)
        loss = F.mse_loss(x1.float(), x) + F.mse_loss(x2.float(), x)
        optimizer.zero_grad()
        job.accelerator.backward(loss)
        optimizer.step()
        job.log(step, total, **{"dae/loss": loss.detach()})
    job.finish("dae", total)


def train_esn(job: Job, variant: str, faces: Dataset, basis: Basis, lamb: float) -> None:
    """Stage `esn-<variant>`: learn which eigenfaces to keep, from clean faces and Gaussian noise alone. lamb:
    price of one."""
    stage, config = f"esn-{variant}", variant_config(job.config, variant)
    esn = placed(job.networks[stage], job.accelerator.device)
    dae = placed(job.networks["dae"].eval(), job.accelerator.device) if config.dae else None
    model = job.accelerator.prepare(maybe_compile(esn, config.compile))
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(esn.parameters(), config.esn_rate, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(esn.parameters(), config.esn_rate)
    per_epoch = math.ceil(len(faces) / config.esn_batch)
    total = config.esn_epochs * per_epoch or config.esn_steps
    for step, (x, _) in job.steps(stage, total, faces, config.esn_batch, optimizer=optimizer):
        if config.halve_epochs:
            # The official scheduler counts the epochs that have ended: each halving comes one later.
            halvings = max(step // per_epoch - 1, 0) // config.halve_epochs
            set_rate(optimizer, config.esn_rate * 0.5**halvings)
        generator = job.generator(step, ESN_NOISE)
        noisy = add_noise(x, config.noise, generator, config.noise_norm)
        with job.accelerator.autocast():
            with torch.no_grad():
                seen = dae(noisy)[1] if dae is not None else noisy
            p = model(seen)
        cost = mask_cost(basis, x, noisy, lamb)
        if config.estimator == "reinforce":
            loss, value = reinforce(p, cost, config.samples, config.baseline, generator)
        elif config.estimator == "exact":
            loss, value = exact(p, cost, config.samples)
        else:
            loss, value = distill(p, cost)
        if config.entropy:
            loss = loss - config.entropy * mask_entropy(p)
        optimizer.zero_grad()
        job.accelerator.backward(loss)
        if config.clip:
            job.accelerator.clip_grad_norm_(esn.parameters(), config.clip)
        optimizer.step()
        if job.due(step, total):
            everyone, best = gathered(p.detach()), cost(cost.oracle()).mean()
            kept, spread = everyone.sum(1).mean(), everyone.std(0).mean()
            values = {"cost": value, "oracle": best, "kept": kept, "sd": spread}
            job.log(step, total, **{f"{stage}/{name}": number for name, number in values.items()})
            if step == total - 1 and kept < 0.02 * config.components and job.accelerator.is_main_process:
                few = f"{kept:.1f} of {config.components} eigenfaces"
                print(f"warning: {stage} keeps only {few}: lambda {lamb:.3g} is too high", file=sys.stderr)
    job.finish(stage, total)
    sheet = purification_sheet(PIN(basis, dae, esn.eval(), "threshold"), faces)
    job.run.picture(stage, sheet, "faces purified by PIN")


def choose_lambda(job: Job, config: Config, variant: str, faces: Dataset, basis: Basis) -> float:
    """The price of an eigenface: as given, or calibrated on up to 2,048 training images."""
    if config.lamb_sparse != "auto":
        lamb = float(config.lamb_sparse)
    else:
        order = torch.randperm(len(faces), generator=step_generator(config.seed, 0, LAMBDA_IMAGES))[:2048]
        clean, noise = [], []
        loader = DataLoader(Subset(faces, order.tolist()), config.esn_batch, num_workers=config.workers)
        for number, (x, _) in enumerate(loader):
            x = x.to(job.accelerator.device)
            generator = step_generator(config.seed, number, LAMBDA_NOISE)
            noisy = add_noise(x, config.noise, generator, config.noise_norm, alone=True)
            clean.append(basis.coefficients(x))
            noise.append(basis.coefficients(noisy) - clean[-1])
        lamb = calibrate_lambda(torch.cat(clean), torch.cat(noise), config.size**2, config.keep)
    job.facts[f"lambda-{variant}"] = lamb
    return lamb


def train(config: Config) -> Path:
    """All stages in order; returns the run folder. Raises UserError on settings that do not fit together."""
    check_settings(config)
    accelerator = start(config)
    faces = training_faces(config)
    run = Run("pin", config, accelerator.is_main_process)
    classes = int(faces.labels.max()) + 1
    networks = build_networks(config, classes)
    whole = {name: as_one(network, accelerator.device) for name, network in networks.items()}
    job = Job(config, accelerator, run, whole)
    job.facts["classes"] = classes
    basis = make_basis(job, faces)
    train_dae(job, faces)
    for number, name in enumerate(config.recognizers):
        train_recognizer(job, name, faces, seed=number)
    for variant in config.variants:
        if job.done(f"esn-{variant}"):
            continue
        lamb = choose_lambda(job, variant_config(config, variant), variant, faces, basis)
        if variant == "ais":
            train_ais(job, faces, basis, lamb)
        else:
            train_esn(job, variant, faces, basis, lamb)
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
