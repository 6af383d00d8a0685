"""Train and draw the rivals of IP-Adapter: each function makes one unit of work of tier C, or returns the stored one."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoints.files import replacing, write_json, write_tensors
from eval.ablation.draws import alone, concatenate, quantise, references
from eval.ablation.memo import Memo, Unit
from eval.ablation.names import alone_name
from eval.ablation.reference import REFERENCE, ReferenceOnly
from eval.ablation.rival import Rival, RivalPipeline, parameters_of, width
from eval.ablation.rivals import LARGE, TRAINED
from eval.ablation.study import Study, Workspace, source_hash
from eval.ablation.tier import ShortStudy
from eval.ablation.training import best_rate
from eval.ablation.work import Job
from eval.bench import draw_prompts
from train.encode import WorldPictures
from train.loop import run
from train.loss import diffusion_loss, sample_inputs
from train.pairs import Batch, Pairs
from train.plan import Plan, autocast
from train.randomness import draw as draw_random
from train.randomness import generator, seeded
from train.setting import SAYS, Setting

NOISES = 4  # drawings of each image prompt alone
CODE = [Path(__file__).parent / f"{name}.py" for name in ("rival", "rivals", "reference", "shuffle", "rival_draws")]
SCENES = "complementary"
DRAWN = "picture", SCENES  # the tasks


@dataclass(frozen=True)
class RivalStudy(ShortStudy):
    """The size of tier C: one seed of each rival. `rates`, `copy_rates`: the learning rates to choose from, of small adapters and of
    what starts as a copy of the base. `code`: a hash of the source files of the rivals."""

    rates: tuple[float, ...] = (5e-4, 1.5e-3, 4.5e-3)
    copy_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: int = 1
    prompts: int = 512
    forms: tuple[str, ...] = (*TRAINED, REFERENCE)
    code: str = field(default_factory=lambda: source_hash(CODE))

    def rates_of(self, name: str) -> tuple[float, ...]:
        return () if name not in TRAINED else self.copy_rates if name in LARGE else self.rates

    def hours(self) -> float:
        slow = 2  # a step of a large rival takes twice as long
        trainings = sum(len(self.rates_of(name)) * (slow if name in LARGE else 1) for name in TRAINED)
        drawings = self.prompts * (NOISES + 1) * (len(self.forms) + 1)
        return (0.049 * self.batch * self.steps * trainings + 0.1 * drawings) / 3600

    def smoke(self) -> RivalStudy:
        small = super().smoke()
        assert isinstance(small, RivalStudy)
        return replace(small, rates=(1e-3, 3e-3), copy_rates=(1e-3,))


def plan_of(study: Study, name: str, rate: float) -> Plan:
    """Return the plan of a rival at a learning rate."""
    return replace(study.plan(name, 0, rate), name=f"{name}-{rate:g}")


def file_of(workspace: Workspace, name: str, rate: float) -> Path:
    """Return the file of a trained rival."""
    return workspace.work / f"{name}-{rate:g}.safetensors"


def rival_study(workspace: Workspace) -> RivalStudy:
    assert isinstance(workspace.study, RivalStudy)
    return workspace.study


def untrained(workspace: Workspace, name: str) -> Rival:
    """Build a rival. The weights depend only on its name."""
    pipeline = workspace.bench().pipeline
    if name == REFERENCE:
        return ReferenceOnly(pipeline.unet, pipeline.schedule)
    with seeded(0):
        return TRAINED[name](pipeline.unet, width(pipeline)).to(workspace.study.device)


def loss_of(rival: Rival, setting: Setting, batch: Batch, g: torch.Generator, training: bool = True) -> Tensor:
    """Compute the loss of Eq. 6 for each picture, `b`. In training, texts and pictures are dropped, and `rival` may add noise."""
    x = sample_inputs(batch, g)
    text, image = x.text, x.image[:, 0, 0]
    if training:
        r = draw_random(lambda n: torch.rand(n, generator=g, device=g.device), len(batch), g)
        text_alone, picture_alone, both = rival.drop
        drop_text = r < both + text_alone
        drop_picture = (r < both) | ((r >= both + text_alone) & (r < both + text_alone + picture_alone))
        text = torch.where(drop_text[:, None, None], batch.empty, text)
        image = torch.where(drop_picture[:, None], rival.drop_picture(image), image)
    context = rival(text, image, g if training else None)
    return diffusion_loss(rival.unet, setting.pipeline.schedule, x.x0, context, x.t, x.eps, setting.gamma if training else None)


def pairs_of(workspace: Workspace, setting: Setting, rival: Rival) -> tuple[Pairs, Pairs]:
    """Return what a rival is trained on: (training, held-out) pairs, with what it reads of the image prompts."""
    sets, both = workspace.source.picture_sets(None, 0, SAYS), (setting.pairs, setting.held_out)
    assert isinstance(both[0], Pairs) and isinstance(both[1], Pairs) and both[0].features is not None
    rival.learn_scale(both[0].features.pictures[:, 0, 0])
    assert isinstance(sets[0], WorldPictures) and isinstance(sets[1], WorldPictures)
    return rival.see(both[0], sets[0].scenes, held_out=False), rival.see(both[1], sets[1].scenes, held_out=True)


def train_rival(workspace: Workspace, name: str, rate: float) -> Unit:
    """Train a rival at a learning rate and write it; return its size and its held-out loss, None if the training diverged."""

    def make() -> Unit:
        setting, plan = workspace.setting(), plan_of(workspace.study, name, rate)
        rival = untrained(workspace, name)
        pairs, held_out = pairs_of(workspace, setting, rival)
        value = {"rival": name, "parameters": parameters_of(rival), "rate": rate}

        def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
            return {"loss": loss_of(rival, setting, batch, g).mean()}

        @torch.no_grad()
        def validate(module: nn.Module) -> dict[str, float]:
            assert isinstance(module, Rival)
            with autocast(plan):
                parts = [
                    loss_of(module, setting, batch, generator(1, i, plan.device), training=False)
                    for i, batch in enumerate(held_out.parts(plan.device))
                ]
            return {"held_out": float(torch.cat(parts).mean())}

        data = pairs.batches(plan.batch, plan.seed)
        made_from = {**setting.made_from, "rival": name, "code": rival_study(workspace).code}
        try:
            kept, log = run(plan, rival, data, loss, validate, workspace.work, 0, made_from=made_from)
        except FloatingPointError:
            return Unit(value | {"held_out": None}, workspace.made)
        write_tensors(file_of(workspace, name, rate), kept.state_dict(), None)
        return Unit(value | {"held_out": log[-1]["held_out"]}, workspace.made)

    return Memo(workspace.work)(training(name, rate), make)


def training(name: str, rate: float) -> str:
    """Name the unit of a training."""
    return f"train-{name}-{rate:g}"


def best_of(units: Mapping[float, Unit], name: str) -> float:
    """Return the learning rate with the lowest held-out loss."""
    return best_rate({rate: unit.value["held_out"] for rate, unit in units.items()}, name)


def choose(workspace: Workspace, name: str) -> Unit:
    """Choose the learning rate of a rival by its held-out loss; ship the weights unless they are large.

    If the best rate is at an edge of the range, one more is trained beyond it, a third or three times as large.
    """

    def make() -> Unit:
        units = {rate: train_rival(workspace, name, rate) for rate in rival_study(workspace).rates_of(name)}
        if (rate := best_of(units, name)) in (low := min(units), max(units)):
            more = rate / 3 if rate == low else rate * 3
            units[more] = train_rival(workspace, name, more)
            rate = best_of(units, name)
        if name not in LARGE:
            shipped = workspace.adapters / f"{name}.safetensors"
            with replacing(shipped) as part:
                shutil.copyfile(file_of(workspace, name, rate), part)
            write_json(shipped.with_suffix(".json"), {"command": workspace.command, **units[rate].value, **units[rate].made})
        losses = {f"{each:.3g}": units[each].value["held_out"] for each in sorted(units)}
        value = {"rival": name, "chosen": rate, "at_edge": rate in (min(units), max(units)), "losses": losses}
        return Unit(value, units[rate].made)

    return Memo(workspace.work)(f"chosen-{name}", make)


def trained(workspace: Workspace, name: str) -> Rival:
    """Load a rival at its chosen learning rate.

    Raises FileNotFoundError if it is not there: because it was trained elsewhere and is not shipped, or by other source files.
    """
    rival = untrained(workspace, name)
    if name in TRAINED:
        memo, file = Memo(workspace.work), workspace.adapters / f"{name}.safetensors"
        chosen = memo.path(f"chosen-{name}")
        if name in LARGE and chosen.exists():
            file = file_of(workspace, name, memo.read(f"chosen-{name}").value["chosen"])
        if not (chosen.exists() and file.exists()):
            raise FileNotFoundError(f"{file} is not there: train and draw the rivals anew, with another folder for --out")
        rival.load_state_dict(load_file(file))
    return rival.to(workspace.study.device).requires_grad_(False)


def draw_rival(workspace: Workspace, name: str, task: str) -> Unit:
    """Draw a task with a rival: the picture alone with `NOISES` noises, other tasks with one."""

    def make() -> Unit:
        bench, rival = workspace.bench(), trained(workspace, name)
        noises = NOISES if task == "picture" else 1
        image, texts = rival.look(bench.pipeline, bench.prompts.images), bench.prompts.texts(task)
        pipeline = RivalPipeline.of(bench.pipeline, rival)
        drawings = draw_prompts(pipeline, texts * noises, torch.cat([image] * noises), 1.0, bench.guidance, bench.steps, f"{name}, {task}")
        parts = [quantise(bench.read(task, part)) for part in drawings.chunk(noises)]
        value = {"rival": name, "task": task, "split": "test", "references": [f"noise {i}" for i in range(noises)]}
        return Unit(value, workspace.made, concatenate(parts))

    return Memo(workspace.work)(f"drawn-{name}-{task}", make)


def jobs_of(workspace: Workspace, tasks: Sequence[str]) -> list[Job]:
    """List all jobs. Each rival draws the picture alone and the complementary prompts."""
    jobs = [Job("references", partial(references, workspace))]
    jobs += [Job(alone_name(task), partial(alone, workspace, task, "test")) for task in DRAWN]
    study = rival_study(workspace)
    for name in study.forms:
        trainings = {training(name, rate): partial(train_rival, workspace, name, rate) for rate in study.rates_of(name)}
        jobs += [Job(job, call) for job, call in trainings.items()]
        after = (f"chosen-{name}",) if trainings else ()
        jobs += [Job(job, partial(choose, workspace, name), tuple(trainings)) for job in after]
        jobs += [Job(f"drawn-{name}-{task}", partial(draw_rival, workspace, name, task), after) for task in DRAWN]
    return jobs
