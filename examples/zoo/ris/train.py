# SPDX-License-Identifier: Apache-2.0
"""Train the referring-segmentation model: `python -m examples.zoo.ris.train`.

The frozen text encoder runs once per distinct sentence; its word features are kept on disk.
Besides the mask, training (only) supervises what each cell of the second stage shows and where
the sentence's object is, through heads that are thrown away.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm

from examples.zoo.objects import COLOURS, KINDS, SIZES
from examples.zoo.ris.data import IMAGE_SIZE, Sample, make_sample, normalize
from examples.zoo.ris.model import Layout, Segmenter
from examples.zoo.ris.sentences import phrase_sentence, sample_expression
from examples.zoo.ris.text import MAX_TOKENS, TEXT_DIM, load_text_encoder, tokenize
from examples.zoo.ris.weights import WEIGHTS
from examples.zoo.scene_cache import SceneArrays, cache_folder, cached_scenes
from examples.zoo.scenes import Scene
from examples.zoo.splits import sample_rng
from examples.zoo.training import Plan, mask_loss, train

SCENES, WORDINGS = 24_000, 4


@dataclass(frozen=True)
class TrainingSet:
    """Scenes with WORDINGS sentences each: sentence numbers and targets int32 [N, WORDINGS]."""

    scenes: SceneArrays
    sentences: NDArray[np.int32]
    targets: NDArray[np.int32]
    words: NDArray[np.float16]
    lengths: NDArray[np.int64]


def word_features(sentences: list[str], path: Path) -> NDArray[np.float16]:
    """Return the text encoder's last hidden states, fp16 [U, MAX_TOKENS, TEXT_DIM], cached."""
    if not path.exists():
        encoder = load_text_encoder()
        shape = (len(sentences), MAX_TOKENS, TEXT_DIM)
        partial = path.with_suffix(".partial")
        store = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            for start in tqdm(range(0, len(sentences), 64), desc="encode", mininterval=5):
                tokens = tokenize(sentences[start : start + 64])
                hidden = encoder(**tokens).last_hidden_state
                store[start : start + 64] = hidden.half().numpy()
        partial.rename(path)
    features: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return features


def more_sentences(sample: Sample, index: int) -> list[tuple[str, int]]:
    """Word the scene of a training sample in WORDINGS - 1 further ways."""
    found = []
    for stream in range(2, WORDINGS + 1):
        rng = sample_rng(0, "train", index, stream)
        expression, target = sample_expression(rng, sample.scene.objects) or (
            sample.expression,
            sample.target,
        )
        found.append((phrase_sentence(rng, expression), target))
    return found


def training_set(count: int) -> TrainingSet:
    """Draw, word and encode the training split, or load it from the cache."""
    folder = cache_folder()
    path = folder / f"ris-{count}x{WORDINGS}.npz"
    drawn: list[list[tuple[str, int]]] = []

    def draw(i: int) -> Scene:
        first = make_sample("train", i)
        drawn.append([(first.sentence, first.target), *more_sentences(first, i)])
        return first.scene

    scenes = cached_scenes("ris-train", count, IMAGE_SIZE, draw)
    if not path.exists():
        if not drawn:
            for i in range(count):
                draw(i)
        texts = np.array([[text for text, _ in row] for row in drawn])
        unique, numbers = np.unique(texts, return_inverse=True)
        targets = np.array([[target for _, target in row] for row in drawn])
        np.savez(path, unique=unique, numbers=numbers.reshape(texts.shape), targets=targets)
    stored = np.load(path)
    sentences = [str(text) for text in stored["unique"]]
    words = word_features(sentences, path.with_suffix(".words.npy"))
    lengths = tokenize(sentences)["attention_mask"].numpy()
    numbers, targets = stored["numbers"].astype(np.int32), stored["targets"].astype(np.int32)
    return TrainingSet(scenes, numbers, targets, words, lengths)


def cell_labels(objects: Tensor, side: int) -> Tensor:
    """Return the number of the object whose box holds each cell's middle, int64 [B, side, side].

    0 is background, k + 1 is object k of `objects` [B, MAX_OBJECTS, COLUMNS].
    """
    middle = (torch.arange(side) + 0.5) * (IMAGE_SIZE / side)
    x0, y0, x1, y1 = objects[..., 3:].float().unbind(-1)
    inside_x = (x0[..., None] <= middle) & (middle < x1[..., None])
    inside_y = (y0[..., None] <= middle) & (middle < y1[..., None])
    inside = inside_y[..., :, None] & inside_x[..., None, :]
    number = torch.arange(1, objects.shape[1] + 1)[None, :, None, None]
    return (inside * number).amax(1)


class Supervised(nn.Module):
    """The model with training-only heads on the second stage and the first decoder step."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.segmenter = Segmenter(layout)
        self.classes = (len(KINDS) + 1, len(COLOURS) + 1, len(SIZES) + 1)
        self.cells = nn.Linear(layout.dims[1], sum(self.classes))
        self.where = nn.Conv2d(layout.decoder[0], 1, 1)
        self.early = nn.ModuleList(nn.Conv2d(width, 1, 1) for width in layout.decoder[1:3])

    def loss(self, batch: Batch, aside: float, depth: int) -> Tensor:
        """Return the mask loss plus `aside` times the side losses.

        The loss is taken after `depth` steps of the decoder, at that step's size.
        """
        decoder = self.segmenter.decoder
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = self.segmenter.encode(batch.pixels, batch.words, batch.mask)
            steps = decoder.steps(maps.fused[: depth + 1])
            cells = self.cells(maps.visual[1]).float()
            where = self.where(steps[0]).float()
            head = decoder.head if depth == 4 else self.early[depth - 2]
            logits = head(steps[-1]).float()
        target = avg_pool2d(batch.target, 2 ** (4 - depth))
        return mask_loss(logits, target) + aside * self._aside(batch, cells, where)

    def _aside(self, batch: Batch, cells: Tensor, where: Tensor) -> Tensor:
        side = self.segmenter.sides[1]
        number = cell_labels(batch.objects, side)
        inside = (number == batch.chosen[:, None, None] + 1).float()[:, None]
        total = 2 * binary_cross_entropy_with_logits(where, inside)
        rows = torch.cat([torch.full_like(batch.objects[:, :1], -1), batch.objects], 1).long()
        for column, scores in enumerate(cells.split(self.classes, dim=-1)):
            labels = rows[..., column].gather(1, number.flatten(1)) + 1
            # Most cells are background; without weights the kinds learn late.
            weight = torch.ones(scores.shape[-1])
            weight[0] = 0.2
            loss = cross_entropy(scores.flatten(0, 1), labels.flatten(), weight)
            total = total + (2 if column == 0 else 0.5) * loss
        return total


@dataclass(frozen=True)
class Batch:
    """Tensors of one step."""

    pixels: Tensor
    words: Tensor
    mask: Tensor
    target: Tensor
    objects: Tensor
    chosen: Tensor


def make_batch(data: TrainingSet, step: int, size: int, seed: int) -> Batch:
    """Gather the batch of a step: consecutive parts of a per-epoch shuffle, a wording each."""
    per_epoch = len(data.scenes) // size
    epoch, part = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(len(data.scenes))
    picks = np.sort(order[part * size : (part + 1) * size])
    wording = (picks + epoch) % data.sentences.shape[1]
    sentence = data.sentences[picks, wording]
    chosen = data.targets[picks, wording]
    images = torch.from_numpy(data.scenes.images[picks]).float() / 255
    target = data.scenes.instances[picks] == (chosen + 1)[:, None, None]
    return Batch(
        normalize(images).to(memory_format=torch.channels_last),
        torch.from_numpy(data.words[sentence]).float(),
        torch.from_numpy(data.lengths[sentence]),
        torch.from_numpy(target).float()[:, None],
        torch.from_numpy(data.scenes.objects[picks]),
        torch.from_numpy(chosen),
    )


def decoder_depth(progress: float) -> int:
    """Return how many decoder steps to train: the fine ones cost most and are learned quickly."""
    return 2 if progress < 0.5 else 3 if progress < 0.7 else 4


def polish(trained: Supervised, data: TrainingSet, plan: Plan, args: argparse.Namespace) -> None:
    """Train the decoder alone at full size; the cosine left its last step little to learn with."""
    trained.requires_grad_(False)
    segmenter = trained.segmenter
    segmenter.decoder.requires_grad_(True)
    # One pixel in thirty belongs to a mask; a single bias moves too slowly to find that out.
    nn.init.constant_(cast(Tensor, segmenter.decoder.head.bias), -4.0)

    def step_loss(step: int) -> Tensor:
        batch = make_batch(data, step, args.batch, args.seed + 1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                maps = segmenter.encode(batch.pixels, batch.words, batch.mask)
            logits = segmenter.decoder(maps.fused)
        return mask_loss(logits.float(), batch.target)

    decoder = train(segmenter.decoder, step_loss, plan)
    segmenter.decoder.load_state_dict(decoder.state_dict())


def main() -> None:
    """Train and write the weights of the trained part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=SCENES)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--polish", type=int, default=500, help="steps of the decoder alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=25.0, help="limit of CPU time")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=cache_folder() / "ris.pt")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    data = training_set(args.scenes)
    torch.manual_seed(args.seed)
    model = Supervised(Layout())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = Plan(
        steps=args.steps, peak_lr=args.peak_lr, minutes=args.minutes, checkpoint=args.checkpoint
    )

    def step_loss(step: int) -> Tensor:
        aside = 0.3 * (1 - 0.7 * step / args.steps)
        batch = make_batch(data, step, args.batch, args.seed)
        return model.loss(batch, aside, decoder_depth(step / args.steps))

    trained = cast(Supervised, train(model, step_loss, plan))
    last = Plan(steps=args.polish, peak_lr=args.peak_lr, average=0.99)
    polish(trained, data, last, args)
    tensors = trained.segmenter.state_dict()
    save_file({k: v.contiguous() for k, v in tensors.items()}, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
