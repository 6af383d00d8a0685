"""Train the adapters of an ablation, each form at the best of several learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.files import read_json
from eval.ablation.forms import FORMS, Form
from eval.ablation.fuses import MixedAdapter, WithoutPadding, mixed
from eval.ablation.memo import Memo, Unit
from eval.ablation.names import rate_name
from eval.ablation.study import RATE_SEED, Workspace
from model.adapter import IPAdapter
from model.text_encoder import TextEncoder
from model.unet import UNet
from train import adapter as training
from train import checkpoint
from train.encode import encode_texts
from train.pairs import EncodedPairs, Pairs
from train.plan import Plan
from train.randomness import seeded
from train.setting import SAYS, Setting

LOSSES = ("step", "held_out", "gain_zero", "gain_shuffled")


def untrained_adapter(setting: Setting, form: Form, seed: int) -> IPAdapter:
    """Build the initial adapter of a form. With the same seed, all forms get the same projection."""
    with seeded(seed):
        adapter = setting.adapter(form.own_projections, form.tokens)
    unet = setting.pipeline.unet
    if form.zero_values:
        for _, to_v in adapter.projections():
            nn.init.zeros_(to_v.get_parameter("weight"))
    return MixedAdapter(unet, adapter.image_projection).to(next(unet.parameters()).device) if form.fuse is mixed else adapter


def setting_of(workspace: Workspace, form: Form) -> Setting:
    """Return what a form is trained on; its texts have no padding if the form reads none."""
    setting = workspace.setting()
    if form.padding:
        return setting
    assert isinstance(setting.pipeline.text, TextEncoder)
    text, sets = WithoutPadding.of(setting.pipeline.text), workspace.source.picture_sets(None, 0, SAYS)
    return replace(setting, pairs=_encode_again(setting.pairs, sets[0], text), held_out=_encode_again(setting.held_out, sets[1], text))


def _encode_again(pairs: EncodedPairs | None, pictures: Any, text: WithoutPadding) -> EncodedPairs:
    """Return the pairs with other text tokens."""
    assert isinstance(pairs, Pairs)
    texts = encode_texts(text, [scene.caption for scene in pictures.scenes])
    return replace(pairs, texts=texts.tokens.to(pairs.texts.device))


def save(adapter: IPAdapter, unet: UNet, path: Path, card: dict[str, Any]) -> None:
    """Save an adapter in the official layout. The card of a `MixedAdapter` has its mixtures, for which this layout has no names."""
    if isinstance(adapter, MixedAdapter):
        card = {**card, "mix": [mix.tolist() for mix in adapter.mix]}
        state = {name: tensor for name, tensor in adapter.state_dict().items() if not name.startswith("mix.")}
        adapter = IPAdapter(unet, adapter.image_projection)
        adapter.load_state_dict(state)
    save_adapter(adapter, unet, path, card)


def load(path: Path, unet: UNet) -> IPAdapter:
    """Load an adapter that `save` wrote."""
    adapter = load_adapter(path, unet)
    if (mix := read_json(path.with_suffix(".json")).get("mix")) is None:
        return adapter
    with_mix = MixedAdapter(unet, adapter.image_projection)
    with_mix.load_state_dict(adapter.state_dict() | {f"mix.{i}": torch.tensor(each) for i, each in enumerate(mix)})
    return with_mix


def train(workspace: Workspace, form: str, plan: Plan, steps: Sequence[int]) -> None:
    """Train one adapter. Write it after each number of steps, unless that file exists with the same settings."""
    settings, state = settings_of(workspace, plan), workspace.work / f"{plan.name}.pt"
    missing = [step for step in steps if workspace.card(plan, step).get("settings") != settings]
    if not missing:
        return
    if (content := checkpoint.load(state)) and content["step"] > missing[0]:
        state.unlink()  # the state is past the missing step, so train from the start
    setting, fuse = setting_of(workspace, FORMS[form]), FORMS[form].fuse
    for step in steps:
        start = untrained_adapter(setting, FORMS[form], plan.seed)
        adapter, log = training.fit(setting, start, plan, workspace.work, fuse, until=step)
        if step in missing:
            losses = [{key: row[key] for key in LOSSES} for row in log if "held_out" in row]
            size = sum(p.numel() for p in adapter.parameters())
            card = {"command": workspace.command, "settings": settings, "parameters": size, "losses": losses}
            save(adapter, setting.pipeline.unet, workspace.adapter(plan, step), card | workspace.made)


def settings_of(workspace: Workspace, plan: Plan) -> dict[str, Any]:
    """Return the settings that the card of an adapter must record. The device is not one of them."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(plan).items() if key != "device"}
    return {"made_from": workspace.made_from, **plain}


def trained_adapter(workspace: Workspace, form: str, plan: Plan, step: int) -> IPAdapter:
    """Load an adapter as it was after some steps of its training; train it first if it is not there."""
    checkpoints = workspace.study.checkpoints if plan.seed != RATE_SEED else (workspace.study.rate_steps,)
    if workspace.card(plan, step).get("settings") != settings_of(workspace, plan):
        train(workspace, form, plan, checkpoints)
    unet = workspace.bench().pipeline.unet
    return load(workspace.adapter(plan, step), unet).to(workspace.study.device)


def try_rate(workspace: Workspace, form: str, rate: float) -> Unit:
    """Return the held-out loss after a short training at this rate; None if the loss was not finite."""

    def make() -> Unit:
        plan = workspace.study.plan(form, RATE_SEED, rate)
        try:
            train(workspace, form, plan, (workspace.study.rate_steps,))
        except FloatingPointError:
            return Unit(None, workspace.made)
        return Unit(workspace.card(plan, workspace.study.rate_steps)["losses"][-1]["held_out"], workspace.made)

    return Memo(workspace.work)(rate_name(form, rate), make)


def best_rate(losses: Mapping[float, float | None], form: str) -> float:
    """Return the rate with the lowest held-out loss. Raises ValueError if no loss was finite."""
    finite = {rate: loss for rate, loss in losses.items() if loss is not None}
    if not finite:
        raise ValueError(f"the loss of {form} is not finite at any learning rate: use lower --rates")
    return min(finite, key=finite.__getitem__)


def chosen_rate(workspace: Workspace, form: str) -> float:
    """Return the learning rate of a form. If there is no choice, nothing is trained for it."""
    if len(workspace.study.rates) == 1:
        return workspace.study.rates[0]
    return best_rate({rate: try_rate(workspace, form, rate).value for rate in workspace.study.rates}, form)


def plan_of(workspace: Workspace, form: str, seed: int) -> Plan:
    """Return the plan of a counted adapter, at the learning rate of its form."""
    return workspace.study.plan(form, seed, chosen_rate(workspace, form))
