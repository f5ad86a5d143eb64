"""Train AnyFace's two streams on captions, codes and CLIP features of faces.

`demo` first teaches its own small CLIP and StyleGAN2 on drawn faces; `differences` adds a row for each place
where paper and released code differ, `study` more rows, steps and seeds. `paper` is the full size, `official`
the same with the released behaviour.

Several GPUs: torchrun --nproc-per-node 8 train.py paper --data-root DIR.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn

from anyface import losses
from anyface.bundle import save_model
from anyface.clip import image_features
from anyface.data import (
    Cache,
    DataName,
    Faces,
    build_cache,
    cut,
    draw_pairs,
    open_faces,
    read_text,
    reconstruction_features,
)
from anyface.losses import BEHAVIOUR, Behaviour
from anyface.model import assemble
from anyface.parts import Learner, constant, warm_cosine
from anyface.ranger import Ranger
from anyface.sheets import training_sheet
from anyface.stages import (
    Constants,
    Stage,
    load_constants,
    make_streams,
    part_learner,
    plan,
    reads_words,
    save_stage,
    variant_config,
    whole_model,
)
from shared.io import Run, load_weights, progress
from shared.loop import Position, average_gradients
from shared.ranges import Count, Natural, Positive, Weight
from shared.runtime import (
    RunConfig,
    StepBatches,
    UserError,
    maybe_compile,
    run_training,
    start,
    step_generator,
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of the data, the networks and their training."""

    data: DataName = "auto"
    """Drawn faces of the simple world, or the layout of a public set; auto recognises it."""
    data_root: Path | None = None
    """Where a public set lies."""
    codes: Path | None = None
    """Inversions of all faces: codes.safetensors or latents.pt; default: looked for under data_root."""
    train_faces: Count = 3000
    """Drawn faces for training."""
    test_faces: Count = 6000
    """Drawn faces for testing; of a public set the first so many test faces."""

    size: Literal["official", "tiny"] = "official"
    """Widths and depths: the release's with pretrained CLIP and generator, or the demo's."""
    clip_weights: Path | None = None
    """CLIP ViT-B/32: OpenAI's ViT-B-32.pt or a state dict in its names."""
    generator_weights: Path | None = None
    """StyleGAN2 for faces: stylegan2-ffhq-config-f.pt, or NVIDIA's ffhq.pkl."""
    identity_weights: Path | None = None
    """model_ir_se50.pth, for lambda_id."""
    clip_steps: Natural = 0
    """tiny: steps of CLIP."""
    mapping_steps: Natural = 2000
    """tiny: steps in which its mapping network learns the faces' traits, before the generator draws."""
    half_steps: Natural = 0
    """tiny: steps of the generator at half its side, where a step costs half; it grows from there."""
    generator_steps: Natural = 0
    """tiny: steps of the generator."""
    wide_steps: Natural = 0
    """tiny: steps of a generator of twice the side, which begins as the first one; 0 leaves it out."""
    judge_steps: Natural = 0
    """tiny: steps of the judge."""

    variants: tuple[str, ...] = ("full",)
    """Streams to train, by their names in VARIANTS."""
    seeds: Count = 1
    """The streams are trained with so many seeds, beginning with `seed`."""
    dt: bool = True
    """Diverse triplet loss on the text stream; without it, MSE to the face's code."""
    cmd: bool = True
    """Cross modal distillation between the hidden features of the streams."""
    clip_loss: bool = True
    """CLIP loss between the decoded text code and its caption."""
    one_stream: bool = False
    """Leave out the image stream, and with it distillation, MSE, reconstruction and cycle."""
    words: bool = False
    """The text stream reads CLIP's features of all tokens instead of the end token's; an extension."""
    behaviour: tyro.conf.OmitArgPrefixes[Behaviour] = field(default_factory=Behaviour)
    """Where the released trainer departs from the method."""
    margin: Weight = 0.2
    """Margin of the diverse triplet loss."""
    noise_layers: Natural = 4
    """M: layers of the decoded text code that come from noise."""
    lambda_dt: Weight = 10.0
    """Weight of the diverse triplet loss (or of what replaces it)."""
    lambda_mse: Weight = 1.0
    """Weight of the image stream's MSE."""
    lambda_cmd: Weight = 0.5
    """Weight of cross modal distillation."""
    lambda_clip: Weight = 1.0
    """Weight of the CLIP loss."""
    lambda_rec: Weight = 1.0
    """Weight of the pixel loss between the face's and the image stream's reconstruction."""
    lambda_id: Weight = 0.0
    """Weight of the identity loss on the decoded text code."""
    lambda_cycle: Weight = 0.0
    """Weight of AnyFace++'s cycle (experimental): the image stream finds a caption's code in its picture."""
    decode_batch: Count | None = None
    """Samples of a step that are decoded for losses on pictures; None: all."""

    optimiser: Literal["ranger", "adam"] = "ranger"
    """Ranger as released, or Adam."""
    lr: Positive = 0.5
    """Learning rate of the mapping layers."""
    lr_transformer: Positive = 1e-4
    """Learning rate of the transformers."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the steps."""
    batch_size: Count = 8
    """Faces per step, over all processes."""
    steps: Natural = 20_000
    """Steps of the streams."""

    log_every: Count = 100
    """Steps between lines of the log."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    sample_every: Count = 1000
    """Steps between pictures."""


PAPER = Config()
SMALL = Config(
    data="world", size="tiny", test_faces=300, clip_steps=1000, half_steps=600, generator_steps=800,
    wide_steps=200, judge_steps=200, variants=("full", "no-dt", "no-cmd"), decode_batch=4,
    optimiser="adam", lr=1e-3, lr_transformer=1e-3, schedule="cosine", batch_size=32, steps=400, log_every=50,
    checkpoint_every=100, sample_every=200,
)  # fmt: skip
DIFFERENCES = ("neg-official", "all-pairs", "clip-official", "no-gradient", "frozen-transformers",
               "batch-sequence", "no-norm", "one-caption", "released")  # fmt: skip
PRESETS = {
    "demo": SMALL,
    "differences": replace(SMALL, variants=(*SMALL.variants, *DIFFERENCES)),
    "study": replace(
        SMALL, seeds=2, steps=900, clip_steps=2500, half_steps=3000, generator_steps=5000, wide_steps=1500,
        judge_steps=750,
        variants=(*SMALL.variants, "cmd-0.1", "no-clip", "one-stream", "neg-all", "words", *DIFFERENCES),
    ),
    "paper": PAPER,
    "official": replace(PAPER, behaviour=BEHAVIOUR["official"]),
}  # fmt: skip


# --- the method -----------------------------------------------------------------------------------------


def stream_terms(
    text: nn.Module,
    image: nn.Module,
    batch: dict[str, Tensor],
    z: Tensor,
    cache: Cache,
    constants: Constants,
    config: Config,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, Tensor]:
    """The weighted losses of one step. batch: of `draw_pairs`; z (B, D): noise for the coarse layers.

    autocast: arithmetic of generator and CLIP; the streams stay in float32.
    """
    w, mean, how = batch["w"], cache.mean, config.behaviour
    generator, clip = constants.generator, constants.clip
    terms = {}

    # Text stream: the caption's code, and that of a mismatched caption.
    w_t, phi_t = read_text(text, clip, batch["f_t"], batch.get("tokens"))
    if config.dt:
        w_other = None
        if how.negatives != "all":
            w_other, _ = read_text(text, clip, batch["f_other"], batch.get("tokens_other"))
        same = batch["face"][:, None] == batch["face"]
        triplet = losses.diverse_triplet(w, w_t, w_other, mean, config.margin, how.negatives, same)
        terms["dt"] = config.lambda_dt * triplet
        terms["norm"] = how.norm_weight * losses.norm_loss(w_t, w)
    else:
        terms["text_mse"] = config.lambda_dt * losses.code_mse(w, w_t)

    # Image stream: exists in training only, and teaches the text stream through the hidden features.
    w_i = None
    if not config.one_stream:
        w_i, phi_i = image(batch["f_i"])
        terms["mse"] = config.lambda_mse * losses.code_mse(w, w_i)
        if config.cmd:
            terms["cmd"] = config.lambda_cmd * losses.cross_modal_distillation(phi_t, phi_i)

    # Pictures: decoded only for the losses that look at them.
    n = config.decode_batch or len(w)
    about_text = (config.clip_loss and config.lambda_clip) or config.lambda_id
    about_image = w_i is not None and config.lambda_rec
    with torch.set_grad_enabled(how.through_generator), autocast():
        x = None
        if about_image or config.lambda_id:
            with torch.no_grad():
                x = generator.synthesis(w[:n])
        if about_text:
            x_t = generator.synthesis(assemble(generator.mapping(z[:n]), w_t[:n], config.noise_layers))
        if config.clip_loss and config.lambda_clip:
            seen = image_features(clip, x_t, how.clip_input)
            scale = clip.logit_scale if config.size == "official" else torch.tensor(100.0).log()
            match = losses.clip_loss(seen, batch["f_t"][:n], scale, how.clip_pairs)
            terms["clip"] = config.lambda_clip * match
        if config.lambda_id:
            terms["id"] = config.lambda_id * losses.identity_loss(constants.identity, x_t, x)
        if about_image:
            x_i = generator.synthesis(w_i[:n])
            terms["rec"] = config.lambda_rec * losses.reconstruction(x.float(), x_i.float())
        if w_i is not None and config.lambda_cycle:
            painted = image_features(clip, generator.synthesis(w_t[:n]), how.clip_input)
    if w_i is not None and config.lambda_cycle:  # outside of autocast, as all that the streams do
        terms["cycle"] = config.lambda_cycle * losses.cycle(w_t[:n], image(painted)[0])
    return terms


def stream_learner(
    stage: Stage, config: Config, accelerator: Accelerator, cache: Cache, constants: Constants, step: int
) -> Learner:
    """Both streams of a stage, to go on at `step`."""
    config = variant_config(config, stage.name)
    if config.noise_layers > constants.generator.n_latent:
        raise UserError(
            f"--noise-layers {config.noise_layers}: the generator has {constants.generator.n_latent} layers"
        )
    rank, processes = accelerator.process_index, accelerator.num_processes
    if config.batch_size % processes:
        raise UserError(f"--batch-size {config.batch_size} does not divide over {processes} processes")
    if config.behaviour.negatives == "official" and config.batch_size < 8 * processes:
        raise UserError("--negatives official needs 8 faces in every process; give a larger --batch-size")
    text, image = (net.to(accelerator.device).train() for net in make_streams(config, constants, stage.seed))
    models = {"text": text, "image": image}
    mapping = [p for net in models.values() for p in net.mapping.parameters()]
    groups = [{"params": mapping, "lr": config.lr}]
    if config.behaviour.train_transformers:
        transformer = [p for net in models.values() for p in net.transformer_encoder.parameters()]
        groups.append({"params": transformer, "lr": config.lr_transformer})
    else:
        for net in models.values():
            net.transformer_encoder.requires_grad_(False)
    fused = accelerator.device.type == "cuda"
    optimiser = Ranger(groups) if config.optimiser == "ranger" else torch.optim.Adam(groups, fused=fused)
    for net in models.values():
        maybe_compile(net, config.compile)
    pairs = iter(StepBatches(len(cache.codes), config.batch_size, stage.seed, stage.steps, step, draws=True))
    choice = "sample" if config.behaviour.all_captions else "id"

    def terms(step: int) -> dict[str, Tensor]:
        # Every process draws the whole batch and keeps its share, so that their number changes nothing.
        batch = draw_pairs(cache, next(pairs), stage.seed, step, choice)
        if not config.words:
            batch = {name: rows for name, rows in batch.items() if not name.startswith("tokens")}
        rng = step_generator(stage.seed, step, stream=12)
        batch["z"] = torch.randn(config.batch_size, constants.generator.style_dim, generator=rng)
        batch = cut(batch, rank, processes)
        z = batch.pop("z").to(accelerator.device, non_blocking=True)
        return stream_terms(text, image, batch, z, cache, constants, config, accelerator.autocast)

    schedule = constant if config.schedule == "constant" else warm_cosine
    return Learner(stage.label, stage.steps, models, optimiser, terms, schedule, True, config.words)


# --- the loop -------------------------------------------------------------------------------------------


def learn(
    learner: Learner,
    config: Config,
    accelerator: Accelerator,
    run: Run,
    position: Position,
    before: int,
    show,
) -> None:
    """Train a learner from where `position` stands. before: steps of earlier stages; show: () -> picture."""
    processes = accelerator.num_processes if learner.shared else 1
    for group in learner.optimiser.param_groups:
        group["initial_lr"] = group["lr"]
    if position.step:
        load_weights(run.folder, learner.models)
        learner.optimiser.load_state_dict(*position.optimisers)
    learning = [p for group in learner.optimiser.param_groups for p in group["params"]]
    for step in progress(range(position.step, learner.steps), learner.label):
        # Dropout's draws depend on (seed, step, process) alone, so a resumed run makes the same.
        torch.manual_seed(step_generator(config.seed, step, 13 + accelerator.process_index).initial_seed())
        for group in learner.optimiser.param_groups:
            group["lr"] = group["initial_lr"] * learner.schedule(step / learner.steps)
        terms = learner.terms(step)
        learner.optimiser.zero_grad(set_to_none=True)
        sum(terms.values()).backward()
        average_gradients(learning, processes)
        learner.optimiser.step()

        position.step = step + 1
        final = position.step == learner.steps
        position.add(terms)
        if position.step % config.log_every == 0 or final:
            run.log(before + position.step, **position.means(accelerator, learner.label))
        if show and (position.step % config.sample_every == 0 or final):
            run.picture(learner.label.replace("/", "-"), show(), synthetic=f"AnyFace, step {position.step}")
        if position.step % config.checkpoint_every == 0 and not final:
            position.optimisers = [learner.optimiser.state_dict()]
            run.save(learner.models, {"position": position}, {"stage": learner.label, "step": position.step})


def load_inputs(config: Config, folder: Path, device: torch.device) -> tuple[Constants, Faces]:
    """The frozen networks, of a tiny run those that lie in its folder, and the training faces."""
    constants = load_constants(config, folder, device)
    return constants, open_faces(config, "train", constants.generator)


def train(config: Config) -> Path:
    """Run all stages of `config`; returns the run folder. Continues a run that was interrupted."""
    stages = plan(config)
    accelerator = start(config)
    device = accelerator.device
    constants = faces = cache = None
    if config.size == "official":  # before the run's folder: a missing file leaves no run that is the newest
        constants, faces = load_inputs(config, Path(), device)
    run = Run("anyface", config, accelerator.is_main_process)
    position = Position()
    run.load({}, {"position": position})
    images: dict[str, Tensor] = {}  # of the reconstructions, by the normalisation that a variant gives CLIP
    before = 0
    for number, stage in enumerate(stages):
        if number >= position.stage:
            show = None
            if stage.part:
                learner = part_learner(stage, config, run.folder, device)
            else:
                if constants is None:
                    constants, faces = load_inputs(config, run.folder, device)
                if cache is None:
                    cache = build_cache(
                        faces, constants.clip, constants.tokenizer, constants.generator,
                        config.behaviour.clip_input, device, words=reads_words(config), images=False,
                    )  # fmt: skip
                how = variant_config(config, stage.name).behaviour.clip_input
                if how not in images:
                    images[how] = reconstruction_features(
                        faces, constants.clip, constants.generator, how, device
                    )
                cache = replace(cache, image=images[how])
                learner = stream_learner(stage, config, accelerator, cache, constants, position.step)
                show = lambda: training_sheet(learner, cache, constants, config.noise_layers, config.seed)  # noqa: B023, E731
            learn(learner, config, accelerator, run, position, before, show)
            if accelerator.is_main_process:
                save_stage(run.folder, stage, learner.models)
            accelerator.wait_for_everyone()
            position.next_stage()
            run.save({}, {"position": position}, {"stage": stage.label, "step": stage.steps})
        before += stage.steps
    if accelerator.is_main_process:
        if constants is None:
            constants, faces = load_inputs(config, run.folder, device)
        mean = faces.codes.mean(0, keepdim=True) if cache is None else cache.mean
        save_model(run.folder / "model", whole_model(config, run.folder, constants, mean))
    run.close()
    return run.folder


if __name__ == "__main__":
    run_training(train, PRESETS, __doc__)
