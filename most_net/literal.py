"""The formulas written out, one image, pixel and slot at a time.

References for the tests and the floor that the benchmark compares with; nothing else uses them.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from most_net.memory import Memory
from most_net.model import MostNet, flatten, unflatten


def literal_fsim(first: np.ndarray, second: np.ndarray) -> float:
    """FSIM of two grey images (H, W) on 0..255, both sides below 384 pixels (no reduction)."""
    pc1, pc2 = literal_phase_congruency(first), literal_phase_congruency(second)
    g1, g2 = literal_gradient(first), literal_gradient(second)
    above = below = 0.0
    for y in range(first.shape[0]):
        for x in range(first.shape[1]):
            a, b, g, h = pc1[y, x], pc2[y, x], g1[y, x], g2[y, x]
            weight = max(a, b)
            similar = (2 * a * b + 0.85) / (a * a + b * b + 0.85)
            similar *= (2 * g * h + 160) / (g * g + h * h + 160)
            above += similar * weight
            below += weight
    return above / below


def literal_gradient(image: np.ndarray) -> np.ndarray:
    """Scharr gradient magnitude, zeros outside the image: (H, W)."""
    height, width = image.shape
    kernel = ((3, 0, -3), (10, 0, -10), (3, 0, -3))
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            gx = gy = 0.0
            for i in range(3):
                for j in range(3):
                    v, u = y + i - 1, x + j - 1
                    if 0 <= v < height and 0 <= u < width:
                        gx += kernel[i][j] * image[v, u] / 16
                        gy += kernel[j][i] * image[v, u] / 16
            out[y, x] = math.hypot(gx, gy)
    return out


def literal_phase_congruency(image: np.ndarray) -> np.ndarray:
    """Kovesi's phase congruency with noise compensation, filters filled in pixel by pixel: (H, W)."""
    height, width = image.shape
    spectrum = np.fft.fft2(image)
    energy_all, amplitude_all = np.zeros((height, width)), np.zeros((height, width))
    for o in range(4):
        filters = [_literal_filter(height, width, s, o) for s in range(4)]
        responses = [np.fft.ifft2(spectrum * f) for f in filters]
        spatial = [np.fft.ifft2(f).real * math.sqrt(height * width) for f in filters]
        even, odd = sum(r.real for r in responses), sum(r.imag for r in responses)
        length = np.sqrt(even**2 + odd**2) + 1e-4
        energy = np.zeros((height, width))
        for r in responses:
            energy += (r.real * even + r.imag * odd) / length
            energy -= np.abs(r.real * odd / length - r.imag * even / length)
        power = -np.median(np.abs(responses[0]) ** 2) / math.log(0.5) / (filters[0] ** 2).sum()
        squares = sum((f**2).sum() for f in spatial)
        products = sum((spatial[i] * spatial[j]).sum() for i in range(4) for j in range(i + 1, 4))
        tau = math.sqrt((2 * power * squares + 4 * power * products) / 2)
        noise = (tau * math.sqrt(math.pi / 2) + 2 * math.sqrt((2 - math.pi / 2) * tau**2)) / 1.7
        energy_all += np.maximum(energy - noise, 0)
        amplitude_all += sum(np.abs(r) for r in responses)
    return energy_all / amplitude_all


def _literal_filter(height: int, width: int, scale: int, orientation: int) -> np.ndarray:
    out = np.zeros((height, width))
    for row in range(height):
        for column in range(width):
            v, u = _literal_frequency(row, height), _literal_frequency(column, width)
            if row == column == 0:
                continue
            radius, theta = math.hypot(u, v), math.atan2(-v, u)
            lowpass = 1 / (1 + (radius / 0.45) ** 30)
            radial = math.exp(-(math.log(radius * 6 * 2**scale) ** 2) / (2 * math.log(0.55) ** 2))
            apart = theta - orientation * math.pi / 4
            apart = abs(math.atan2(math.sin(apart), math.cos(apart)))
            sigma = math.pi / 4 / 1.2
            out[row, column] = radial * lowpass * math.exp(-(apart**2) / (2 * sigma**2))
    return out


def _literal_frequency(index: int, n: int) -> float:
    centred = index if index < (n + 1) // 2 else index - n
    return centred / (n - 1) if n % 2 else centred / n


def literal_scoot(first: np.ndarray, second: np.ndarray) -> float:
    """Scoot of two grey images (H, W) on 0..255."""
    return 1 / (1 + math.dist(literal_texture(first), literal_texture(second)))


def literal_texture(image: np.ndarray) -> list[float]:
    """Contrast and energy of each of the 4x4 blocks: 32 numbers."""
    height, width = image.shape
    contrasts, energies = [], []
    for v in range(4):
        for u in range(4):
            block = image[height * v // 4 : height * (v + 1) // 4, width * u // 4 : width * (u + 1) // 4]
            counts = [[0.0] * 6 for _ in range(6)]
            for dy, dx in ((0, 1), (-1, 1), (-1, 0), (-1, -1)):
                for y in range(block.shape[0]):
                    for x in range(block.shape[1]):
                        if 0 <= y + dy < block.shape[0] and 0 <= x + dx < block.shape[1]:
                            a = min(max(math.floor(6 * float(block[y, x]) / 255 + 1), 1), 6)
                            b = min(max(math.floor(6 * float(block[y + dy, x + dx]) / 255 + 1), 1), 6)
                            counts[a - 1][b - 1] += 1
            rounded = [[math.floor(count / 4 + 0.5) for count in row] for row in counts]
            total = sum(map(sum, rounded))
            cells = [(i, j, rounded[i][j] / total) for i in range(6) for j in range(6)]
            contrasts.append(sum((i - j) ** 2 * p for i, j, p in cells))
            energies.append(sum(p * p for _, _, p in cells))
    return contrasts + energies


def literal_write(memory: Memory, queries: Tensor, features: Tensor) -> None:
    """`Memory.write` without revival, a loop over the slots (M, C), (M, C)."""
    nearest = (queries @ memory.keys.T).argmax(1)
    for slot in range(memory.slots):
        positions = (nearest == slot).nonzero()[:, 0]
        if len(positions):
            query = F.normalize(queries[positions].sum(0), dim=0)
            key = memory.momentum * memory.keys[slot] + (1 - memory.momentum) * query
            memory.keys[slot] = F.normalize(key, dim=0)
            value = features[positions].mean(0)
            memory.values[slot] = memory.momentum * memory.values[slot] + (1 - memory.momentum) * value
            memory.age[slot] = 0
            memory.usage[slot] += len(positions)
        else:
            memory.age[slot] += 1


def literal_read(memory: Memory, queries: Tensor) -> Tensor:
    """`Memory.read` with the attention written out: (M, C) -> (M, C)."""
    attention = torch.softmax(queries @ memory.keys.T / memory.tau, dim=1)
    return attention @ memory.values


def literal_update(
    net: MostNet,
    discriminator: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    photo: Tensor,
    sketch: Tensor,
) -> None:
    """One training step as the equations stand: every use computed where it is used, a loop over the slots.

    photo (B, 3, H, W) and sketch (B, 1, H, W) in [-1, 1]. Two decoder calls, three of the discriminator, the
    queries and sketch features computed again for the write.
    """
    memory = net.memories[0]
    f = net.photo_encoder(photo)
    retrieved = unflatten(literal_read(memory, flatten(net.key_head(f))), f)
    features = net.sketch_encoder(sketch)
    drawn, again = net.decode(f, retrieved), net.decode(f, features)
    loss = F.l1_loss(drawn, sketch) + F.l1_loss(again, sketch)
    loss = loss + 0.5 * (1 - F.cosine_similarity(retrieved, features.detach(), dim=1).mean())
    loss = loss + (discriminator(photo, drawn) - 1).square().mean()
    optimizers[0].zero_grad()
    loss.backward()
    optimizers[0].step()
    with torch.no_grad():
        queries = flatten(net.key_head(net.photo_encoder(photo)))
        literal_write(memory, queries, flatten(net.sketch_encoder(sketch)))
    real, fake = discriminator(photo, sketch), discriminator(photo, drawn.detach())
    loss = 0.5 * ((real - 1).square().mean() + fake.square().mean())
    optimizers[1].zero_grad()
    loss.backward()
    optimizers[1].step()
