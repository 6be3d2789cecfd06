"""Every causal model of the installed transformers beside its own logits, PEFT's reload and its own generation."""

import copy
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_fast.errors import UserError
from rlhf_fast.models.backbone import Backbone
from rlhf_fast.models.peft_io import load_adapter, save_adapter
from rlhf_fast.rollout import Drawing, check_sampler
from rlhf_fast.rollout.engines import sample_rows
from rlhf_fast.rollout.rows import Row as Sampled
from tests.models.causal_models import VOCAB, make_causal
from tests.models.tiny_models import scramble

ATOL = 2e-4  # nats, in fp32 with logits of about 10
WIDTH, SHORT = 9, 6


def rows(padding: str) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (3, WIDTH) of three texts, two of them of SHORT tokens and padded on that side."""
    ids = torch.randint(3, VOCAB - 4, (3, WIDTH), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    gap = slice(0, WIDTH - SHORT) if padding == "left" else slice(SHORT, WIDTH)
    ids[1:, gap], mask[1:, gap] = 0, 0
    return ids, mask


def own_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """log p of each token after the first, from the model's own logits of one text at a time, without padding."""
    with torch.no_grad():
        logits = torch.cat([model(input_ids=row[None], use_cache=False).logits for row in ids])
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def texts(padding: str) -> list[Tensor]:
    ids, mask = rows(padding)
    return [row[keep == 1] for row, keep in zip(ids, mask, strict=True)]


def scored(backbone: Backbone, role: str | None, padding: str) -> list[Tensor]:
    """Our log-probabilities of the same, of texts padded together."""
    ids, mask = rows(padding)
    with torch.no_grad():
        logprobs = backbone.logprobs(backbone.hidden(ids, mask, [role])[role], ids, mask)
    return [row[keep == 1][1:] for row, keep in zip(logprobs, mask, strict=True)]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    difference = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    return difference if difference == difference else float("inf")


def check_roles(backbone: Backbone) -> None:
    batch = rows("right")
    joint = backbone.hidden(*batch, ["policy", "reference", "critic"])
    alone = {role: backbone.hidden(*batch, [role])[role] for role in joint}
    assert (alone["policy"] - alone["critic"]).abs().max() > 1e-3, "the adapters change nothing"
    difference = apart(list(joint.values()), list(alone.values()))
    assert difference < 1e-3, f"{difference:.2g}"
    lower = backbone.lower(*batch)
    if lower is not None:
        upper = backbone.hidden(*batch, ["policy", "critic"], lower=lower)
        assert apart(list(upper.values()), [alone["policy"], alone["critic"]]) < 1e-3, "from lower"


def gradients(backbone: Backbone, recompute: bool) -> dict[str, Tensor]:
    backbone.enable_checkpointing(recompute)
    ids, mask = rows("right")
    hidden = backbone.hidden(ids, mask, ["policy", "critic"])
    loss = backbone.logprobs(hidden["policy"], ids, mask).sum() + backbone.logprobs(hidden["critic"], ids, mask).sum()
    loss.backward()
    found = {}
    for role in ("policy", "critic"):
        for name, parameter in backbone.named_parameters_of(role).items():
            found[f"{role} {name}"] = torch.zeros(1) if parameter.grad is None else parameter.grad
            parameter.grad = None
    backbone.enable_checkpointing(False)
    return found


def check_gradients(backbone: Backbone) -> None:
    plain, again = gradients(backbone, False), gradients(backbone, True)
    dead = [name for name, grad in plain.items() if not grad.abs().max() > 0]
    assert not dead, f"{len(dead)} of {len(plain)} have no gradient, such as {dead[0]}"
    for name, grad in plain.items():
        assert (grad - again[name]).abs().max() <= 1e-3 * grad.abs().max() + 1e-5, f"{name} recomputed"


def peft_logprobs(model: torch.nn.Module) -> list[Tensor]:
    return [own_logprobs(model, text[None])[0] for text in texts("right")]


def check_peft_loads(backbone: Backbone, fresh: PreTrainedModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(backbone, "policy", folder)
        theirs = peft_logprobs(PeftModel.from_pretrained(fresh, folder).eval())
    ours, base = scored(backbone, "policy", "right"), scored(backbone, None, "right")
    assert apart(ours, base) > 0.01, "the adapter changes nothing"
    difference = apart(ours, theirs)
    assert difference < ATOL, f"{difference:.2g} nats"


def check_loads_pefts(backbone: Backbone, fresh: PreTrainedModel) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(backbone.linear_shapes), task_type="CAUSAL_LM")
    model = get_peft_model(fresh, config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    theirs = peft_logprobs(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        load_adapter(backbone, "peft", folder, trainable=False)
    difference = apart(scored(backbone, "peft", "right"), theirs)
    assert difference < ATOL, f"{difference:.2g} nats"


def check_generation(backbone: Backbone) -> None:
    """The log-probabilities that sampling had are those that are scored, and those of the model's own logits of each
    row alone; of prompts of two lengths."""
    prompts = [text.tolist() for text in texts("left")]
    found = check_sampler(backbone, prompts, pad=0)
    if not found.holds:
        raise UserError("it does not sample from the distribution that it is scored by")
    asked = [Sampled(number, ids, 0, 5) for number, ids in enumerate(prompts)]
    drawing = Drawing(["policy"], 1.0, 0, 1.0)
    drawing.begin(0)
    sample_rows(backbone, drawing, asked, 5, stops=(), pad=0)
    for row in asked:
        with backbone.using("policy"):
            own = own_logprobs(backbone.model, torch.tensor([row.ids + row.tokens]))[0, -len(row.tokens) :]
        assert_near(torch.tensor(row.logprobs), own, f"row {row.number}")


def assert_near(ours: Tensor, theirs: Tensor, what: str) -> None:
    difference = (ours - theirs).abs().max().item()
    assert difference < ATOL, f"{what}: {difference:.2g} nats"


def add_roles(backbone: Backbone, top_layers: int | None) -> None:
    for seed, (name, rank) in enumerate([("policy", 4), ("critic", 3)]):
        if name in backbone.adapters:
            backbone.remove_adapter(name)
        backbone.add_adapter(name, rank=rank, top_layers=top_layers)
        scramble(backbone, name, seed)


@dataclass(frozen=True)
class Row:
    """One line of the table: what holds for an architecture, and what is refused and why."""

    model_type: str
    trains: str
    once: str = ""
    samples: str = ""
    left_out: str = ""

    def __str__(self) -> str:
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]
        cells = (f"`{self.model_type}`", kind, self.trains, self.once, self.samples, self.left_out)
        return "| " + " | ".join(cells) + " |"


def reason(error: Exception) -> str:
    """One line without the class it names and without figures, which differ between machines."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    line = re.sub(r"^unsupported architecture \w+: ", "", line)
    return re.sub(r" by [\d.e+]+ nats", "", line).replace("|", "\\|")


def walk(model_type: str) -> Row:
    """Everything that the table says of an architecture, found out. AssertionError where the library is wrong."""
    try:
        model = make_causal(model_type)
    except Exception as error:  # noqa: BLE001 whatever the code of an architecture may raise
        return Row(model_type, f"not tried, transformers cannot make one here: {reason(error)}")
    fresh = copy.deepcopy(model)
    try:
        own = [own_logprobs(model, text[None])[0] for text in texts("right")]
    except Exception:  # noqa: BLE001 whatever the code of an architecture may raise
        own = []  # it takes more than text, as Backbone must find
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            backbone = Backbone(model)
        except UserError as error:
            return Row(model_type, f"refused: {reason(error)}")
        difference = apart(scored(backbone, None, "right"), own)
        assert difference < ATOL, f"the base model: {difference:.2g} nats"
        add_roles(backbone, top_layers=2)
        check_roles(backbone)
        check_gradients(backbone)
        once = "yes" if backbone.lower(*rows("right")) is not None else "no"
        check_peft_loads(backbone, copy.deepcopy(fresh))
        add_roles(backbone, top_layers=None)
        check_roles(backbone)
        check_gradients(backbone)
        check_peft_loads(backbone, copy.deepcopy(fresh))
        check_loads_pefts(backbone, fresh)
        torch.manual_seed(1)
        try:
            check_generation(backbone)
            samples = "yes"
        except UserError as error:
            samples = f"refused: {reason(error)}"
    left_out = sorted({f"`{'.'.join(name.split('.')[-2:])}`" for name in backbone.left_out})
    return Row(model_type, "yes", once, samples, ", ".join(left_out))


PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
INTRODUCTION = """# Architectures

Every causal language model of transformers {version}, tried as a tiny model with random weights by
`python -m tests.models.walk`, which writes this page. {yes} of {all} train, {refused} are refused in one line when the
model is loaded, {untried} could not be made on the machine that wrote this.

- **trains**: log-probabilities are those of the model's own logits (2e-4 nats at logits of about 10); padding on the
  right changes nothing; several roles in one traversal equal each alone, with adapters on all layers and on the top
  ones; gradients with activation checkpointing equal those without; PEFT {peft} loads our adapters and we load PEFT's,
  to the same log-probabilities.
- **once**: the layers below the adapters run once for all roles and can be kept between epochs (`top_layers`). Where
  they hand on more than their output, every role runs them all.
- **samples**: `ppo` and `grpo` can use it: what is sampled from prompts of several lengths, padded on the left, is what
  is scored. Otherwise those runs are refused at their start.
- **left out**: linear layers that `all-linear` leaves out and that no adapter may name, because PEFT could not load
  it, because the model does not call them for every token in order, as with experts, or because no gradient reaches
  them on a short text, as with the indexers of sparse attention.

The same comparison is made with the real weights whenever a model is loaded, so an architecture that is not listed here
works, or is refused with the reason. It runs a few tokens; on the meta device it does not.

| model type | class | trains | once | samples | left out |
|---|---|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    counts = [sum(row.trains.startswith(word) for row in rows) for word in ("yes", "refused", "not tried")]
    words = {"version": transformers.__version__, "peft": peft.__version__, "all": len(rows)}
    head = INTRODUCTION.format(**words, yes=counts[0], refused=counts[1], untried=counts[2])
    return head + "".join(f"{row}\n" for row in rows)


if __name__ == "__main__":
    PAGE.write_text(page([walk(model_type) for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]))
