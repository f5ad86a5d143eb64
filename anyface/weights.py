"""Released weights, read without running what is in the files.

rosinality's and e4e's `.pt`, NVIDIA's `.pkl`, OpenAI's and open_clip's CLIP, IR-SE50, Light CNN, and the
checkpoints of the AnyFace++ release. Where to get each stands in the README.
"""

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from anyface.clip import CLIP, clip_from_state
from anyface.encoder import E4E
from anyface.model import FlatMapper, Memory
from anyface.stylegan2 import Generator
from shared.runtime import UserError
from shared.weights import load_pickle, load_state, load_torch


class Stored:
    """An object of NVIDIA's pickles: its class's name and its attributes. Source text in it is not run."""

    def __init__(self, meta: dict[str, Any]):
        self.class_name, self.state = meta["class_name"], meta["state"]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Parameters and buffers by name, as `state_dict` would give them."""
        found = {}
        for kind in ("_parameters", "_buffers"):
            found |= {prefix + k: v.detach() for k, v in self.state[kind].items() if v is not None}
        for name, module in self.state["_modules"].items():
            if isinstance(module, Stored):
                found |= module.tensors(f"{prefix}{name}.")
        return found


class _EasyDict(dict):
    """Stand-in for dnnlib.util.EasyDict."""


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read_nvidia(path: Path) -> dict[str, Any]:
    """An NVIDIA network pickle (stylegan2-ada-pytorch) -> its entries, networks as `Stored`.

    Only tensors, plain values and these stand-ins are made; whatever else the pickle names is refused with a
    UserError.
    """
    multiarray = np._core.multiarray
    replace: dict[str, Any] = {
        "torch_utils.persistence._reconstruct_persistent_obj": Stored,
        "dnnlib.util.EasyDict": _EasyDict,
        "torch.storage._load_from_bytes": _storage,
    }
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        replace[f"{module}.scalar"] = multiarray.scalar
        replace[f"{module}._reconstruct"] = multiarray._reconstruct
    allowed = (
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "collections.OrderedDict",
        "builtins.set",
        "numpy.dtype",
        "numpy.ndarray",
    )
    entries = load_pickle(path, allowed, replace)
    if not isinstance(entries, dict) or not isinstance(entries.get("G_ema"), Stored):
        raise UserError(f"{path}: no NVIDIA network pickle (no G_ema of stylegan2-ada-pytorch's form in it)")
    return entries


def nvidia_to_rosinality(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Names and shapes of NVIDIA's generator -> rosinality's, with `latent_avg`. Values stay as they are."""
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("resample_filter"):
            continue
        if name == "mapping.w_avg":
            state["latent_avg"] = value
        elif found := re.fullmatch(r"mapping\.fc(\d+)\.(weight|bias)", name):
            state[f"style.{int(found[1]) + 1}.{found[2]}"] = value
        elif name == "synthesis.b4.const":
            state["input.input"] = value[None]
        elif found := re.fullmatch(r"synthesis\.b(\d+)\.(conv0|conv1|torgb)\.(.+)", name):
            level, layer, rest = int(found[1]).bit_length() - 1, found[2], found[3]
            if layer == "torgb":
                target = "to_rgb1" if level == 2 else f"to_rgbs.{level - 3}"
            else:
                target = "conv1" if level == 2 else f"convs.{2 * (level - 3) + int(layer[-1])}"
            if rest == "noise_const":
                number = 0 if level == 2 else 2 * level - 5 + int(layer[-1])
                state[f"noises.noise_{number}"] = value[None, None]
            elif rest == "weight":
                state[f"{target}.conv.weight"] = value[None]
            elif rest.startswith("affine."):
                state[f"{target}.conv.modulation.{rest.removeprefix('affine.')}"] = value
            elif rest == "noise_strength":
                state[f"{target}.noise.weight"] = value.reshape(1)
            elif rest == "bias" and layer == "torgb":
                state[f"{target}.bias"] = value.reshape(1, 3, 1, 1)
            elif rest == "bias":
                state[f"{target}.activate.bias"] = value
            else:
                raise UserError(f"{path}: {name} has no counterpart in this generator")
        else:
            raise UserError(f"{path}: {name} has no counterpart in this generator")
    return state


def generator_from_state(state: dict[str, Tensor], path: Path) -> Generator:
    """A generator of the sizes that a state dict in rosinality's names tells."""
    try:
        levels = len({key.split(".")[1] for key in state if key.startswith("to_rgbs.")})
        channels = {4: state["input.input"].shape[1]}
        for i in range(levels):
            channels[8 * 2**i] = state[f"convs.{2 * i}.conv.weight"].shape[1]
        n_mlp = len([key for key in state if re.fullmatch(r"style\.\d+\.weight", key)])
        style_dim = state["conv1.conv.modulation.weight"].shape[1]
    except KeyError as error:
        raise UserError(
            f"{path}: no StyleGAN2 generator in rosinality's names ({error} is missing)"
        ) from None
    return Generator(4 * 2**levels, style_dim, n_mlp, channels=channels)


def _fill(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The filters are constants, which some files leave out."""
    own = module.state_dict()
    return state | {k: v for k, v in own.items() if k.endswith("kernel") and k not in state}


def generator_state(path: Path) -> tuple[dict[str, Tensor], Tensor | None]:
    """rosinality's `.pt`, NVIDIA's `.pkl` or a plain state dict -> (state in rosinality's names, mean w)."""
    if path.suffix == ".pkl":
        network = read_nvidia(path)["G_ema"]
        if network.state.get("c_dim"):
            raise UserError(f"{path}: a generator with class labels; AnyFace needs one without")
        state = nvidia_to_rosinality(network.tensors(), path)
        return state, state.pop("latent_avg", None)
    content = load_torch(path)
    if isinstance(content, dict) and "g_ema" in content:
        return content["g_ema"], content.get("latent_avg")
    if isinstance(content, dict) and "state_dict" in content:
        state = {
            key.removeprefix("decoder."): value
            for key, value in content["state_dict"].items()
            if key.startswith("decoder.")
        }
        return state, content.get("latent_avg")
    return content, None


def load_generator(path: Path) -> tuple[Generator, Tensor]:
    """A generator of whatever size the file holds, in eval mode, and its mean w+ (1, n_latent, style_dim).

    Takes rosinality's `.pt` (g_ema and latent_avg), NVIDIA's `.pkl` and e4e's `.pt`. Without a mean in the
    file, that of 4,096 draws.
    """
    state, mean = generator_state(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: holds no state dict of tensors")
    network = generator_from_state(state, path)
    load_state(network, _fill(network, state), path)
    network.eval().requires_grad_(False)
    if mean is None:
        mean = network.mean_latent(generator=torch.Generator().manual_seed(0))
    mean = mean.float().reshape(1, -1, network.style_dim).expand(1, network.n_latent, -1)
    return network, mean.contiguous()


def clip_state(path: Path) -> dict[str, Tensor]:
    """OpenAI's TorchScript archive, or a state dict (open_clip's), as float32 tensors by OpenAI's names."""
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated, but it is the form that OpenAI publishes.
            warnings.simplefilter("ignore", FutureWarning)
            script = torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError):
        content = load_torch(path)
    else:
        content = script.state_dict()
    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no CLIP state dict")
    notes = ("input_resolution", "context_length", "vocab_size")
    return {
        key.removeprefix("module."): value.float() if value.is_floating_point() else value
        for key, value in content.items()
        if key not in notes
    }


def load_clip(path: Path) -> CLIP:
    """CLIP with a vision transformer, of whatever size the file holds, frozen and in eval mode."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    state = clip_state(path)
    try:
        network = clip_from_state(state)
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: no CLIP with a vision transformer in OpenAI's names ({error})") from None
    load_state(network, state, path)
    return network.eval().requires_grad_(False)


def load_e4e(path: Path) -> tuple[E4E, Tensor]:
    """`e4e_ffhq_encode.pt` -> encoder in eval mode and the mean code (1, n_latent, 512) to add."""
    content = load_torch(path)
    if not isinstance(content, dict) or not {"state_dict", "latent_avg"} <= content.keys():
        raise UserError(f"{path}: not an e4e checkpoint (state_dict and latent_avg expected)")
    state = {
        key.removeprefix("encoder."): value
        for key, value in content["state_dict"].items()
        if key.startswith("encoder.")
    }
    n_latent = len({key.split(".")[1] for key in state if key.startswith("styles.")})
    network = E4E(n_latent)
    load_state(network, state, path)
    mean = content["latent_avg"].float()
    return network.eval().requires_grad_(False), mean.reshape(1, -1, 512).expand(1, n_latent, -1)


def load_memory(path: Path) -> Memory:
    """`memory_N.pt` of the release: 26 tensors (K_i, E), a list or one tensor (26, K, E)."""
    banks = load_torch(path)
    if isinstance(banks, dict):
        banks = list(banks.values())
    if not isinstance(banks, (list, tuple, Tensor)) or not all(
        isinstance(bank, Tensor) and bank.ndim == 2 for bank in banks
    ):
        raise UserError(f"{path}: no memory; one tensor (slots, width) for each of its banks is expected")
    return Memory(list(banks))


def load_release(path: Path) -> FlatMapper:
    """`iteration_N.pt` of the AnyFace++ release -> its mapper, the one part that inference uses."""
    state = _part(path, "I_map.")
    width, inputs = state["mapping.0.weight"].shape if "mapping.0.weight" in state else (0, 0)
    depth = len([key for key in state if key.endswith(".weight")])
    if not width or width % 512:
        raise UserError(
            f"{path}: no AnyFace++ checkpoint (I_map.mapping.0.weight is missing or of odd width)"
        )
    with torch.device("meta"):
        network = FlatMapper(inputs, width // 512, 512, depth)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _part(path: Path, prefix: str) -> dict[str, Tensor]:
    content = load_torch(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no state dict")
    part = {k.removeprefix(prefix): v for k, v in content.items() if k.startswith(prefix)}
    return part or content


PREFIXES = {
    "anyface_T_map": "T_map.",
    "anyfacepp_I_map": "I_map.",
    "anyfacepp_CA_NET": "CA_NET.",
    "e4e_encoder_1024": "encoder.",
}


def load_into(network: nn.Module, name: str, path: Path) -> None:
    """Fill `official(name)` from its released file, whatever wraps it. UserError lists what does not fit."""
    if name.startswith("stylegan2_generator"):
        state = _fill(network, generator_state(path)[0])
    elif name.startswith("stylegan2_discriminator"):
        content = load_torch(path)
        state = _fill(network, content.get("d", content))
    elif name.startswith("openai_clip"):
        state = clip_state(path)
    else:
        state = _part(path, PREFIXES.get(name, ""))
    load_state(network, state, path)
