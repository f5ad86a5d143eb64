"""Make codes.safetensors, the inversions of a set's faces that training needs.

Either from the pictures (an e4e encoder, W+ optimisation, or one after the other), or from a `latents.pt`
whose rows belong to a list of file names.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from anyface.bundle import Model
from anyface.clip import BPETokenizer
from anyface.datasets import Layout, open_set, write_codes
from anyface.model import Stream
from anyface.use import EXPLAINED, invert
from anyface.weights import load_clip, load_e4e, load_generator
from shared.io import progress, read_image, read_utf8
from shared.ranges import Natural
from shared.runtime import UserError, parse, pick_device, run_main
from shared.weights import load_torch


@dataclass(frozen=True)
class CodesOptions:
    """Where the pictures or codes are, and how to invert."""

    data_root: Path | None = None
    """A set in one of the public layouts; its train and test faces are inverted."""
    layout: Layout = "auto"
    """Layout of the set; with --latents, face-list names codes by paths instead of stems."""
    latents: Path | None = None
    """Instead of inverting: a tensor of codes (N, L, D), e.g. StyleCLIP's; needs --names."""
    names: Path | None = None
    """Text file with the file name of each row of --latents, one a line."""
    generator_weights: Path | None = None
    """StyleGAN2: stylegan2-ffhq-config-f.pt, or NVIDIA's ffhq.pkl."""
    clip_weights: Path | None = None
    """CLIP of the optimisation's second term: ViT-B-32.pt."""
    e4e_weights: Path | None = None
    """e4e_ffhq_encode.pt: start from the encoder's code."""
    steps: Natural = 300
    """Steps of the optimisation for each face; 0: the encoder alone."""
    out: Path = Path("codes.safetensors")
    """File to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: CUDA when there is one."""


def convert(latents: Path, names: Path | None, out: Path, paths: bool = False) -> None:
    """Name the rows of a tensor of codes by the files' stems, or by their paths without the ending (paths),
    as `face-list` calls its faces. UserError when the counts differ or a name comes twice."""
    codes = load_torch(latents)
    if not isinstance(codes, torch.Tensor) or codes.ndim != 3:
        raise UserError(f"{latents}: expected one tensor of codes (N, L, D)")
    if names is None or not names.is_file():
        raise UserError(f"--names {names}: a text file with the file name of each row of {latents} is needed")
    files = [Path(line.strip()) for line in read_utf8(names, "a list of files").splitlines() if line.strip()]
    faces = [str(file.with_suffix("")) if paths else file.stem for file in files]
    if len(faces) != len(codes) or len(set(faces)) != len(faces):
        raise UserError(f"{names}: {len(faces)} names, {len(set(faces))} different, for {len(codes)} codes")
    write_codes(out, faces, codes.float())


def invert_set(options: CodesOptions) -> None:
    """Codes of all pictures of a set, train and test. UserError for missing weights or pictures.

    What `invert` remarks on goes into a text file beside the codes, a line for each remark, and is summed up
    on stderr.
    """
    if options.generator_weights is None or options.clip_weights is None:
        raise UserError("inversion needs --generator-weights and --clip-weights")
    device = pick_device(options.device)
    generator, mean = load_generator(options.generator_weights)
    clip = load_clip(options.clip_weights)
    # `invert` works on a whole model; the text stream plays no part in it.
    text = Stream(clip.sizes["embed_dim"], (1,), generator.n_latent, generator.style_dim, layers=1)
    model = Model(clip, BPETokenizer(clip.context_length), generator, text, mean.to(device))
    for part in (clip, generator):
        part.to(device).eval().requires_grad_(False)
    encoder = None if options.e4e_weights is None else load_e4e(options.e4e_weights)
    if encoder is not None:
        encoder[0].to(device).eval().requires_grad_(False)
    pictures: dict[str, Path] = {}  # a face that both parts list is inverted once
    for part in ("train", "test"):
        found = open_set(options.data_root, part, options.layout)
        for name, path in zip(found.names, found.pictures, strict=True):
            if path is None:
                raise UserError(f"{found.title}: no picture of face {name}; put it into images/")
            pictures[name] = path
    codes, poor = [], []
    remarks: dict[str, list[str]] = {}
    for name, path in progress(pictures.items(), "faces"):
        inverted = invert(model, read_image(path), options.steps, encoder)
        codes.append(inverted.code.cpu())
        poor += [name] if inverted.explained < EXPLAINED else []
        if inverted.warnings:
            remarks[name] = inverted.warnings
    write_codes(options.out, list(pictures), torch.cat(codes).float())
    listed = options.out.with_suffix(".warnings.txt")
    listed.unlink(missing_ok=True)  # of an earlier call
    if remarks:
        lines = [f"{name}: {remark}" for name, own in remarks.items() for remark in own]
        listed.write_text("\n".join(lines) + "\n", "utf-8")
        print(
            f"warning: {len(remarks)} of {len(pictures)} faces came with remarks, listed in {listed}; "
            f"the first: {lines[0]}",
            file=sys.stderr,
        )
    if poor:
        print(
            f"warning: {len(poor)} of {len(pictures)} faces are reproduced to less than "
            f"{100 * EXPLAINED:.0f} % of their variance, e.g. {', '.join(poor[:5])}: "
            "are the pictures aligned as in FFHQ?",
            file=sys.stderr,
        )


def main(options: CodesOptions) -> Path:
    """Write the codes; returns the file."""
    if options.latents is not None:
        convert(options.latents, options.names, options.out, options.layout == "face-list")
    else:
        invert_set(options)
    return options.out


if __name__ == "__main__":
    run_main(lambda: print(main(parse(CodesOptions, __doc__))))
