"""How an op is registered: from the NamedTuples of its inputs, once, for compilers, modes and autograd.

A torch.library.custom_op walks its arguments in Python in forward and in backward, for longer than a small kernel runs.
So an op with a gradient is defined by a schema, with an autograd.Function of its own, which an eager call applies to
the computation itself; and an eager call of one without a gradient is the computation.

What a kernel cannot do is an error here, for all ops and on every way into one: a derivative in forward mode, a second
one, those of torch.func, vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

INSTEAD = "backend='reference' can do that"

# What a field of the inputs may be, and what a schema calls it.
_TYPES = {
    Tensor: "Tensor", Tensor | None: "Tensor?", list[Tensor]: "Tensor[]", list[Tensor | None]: "Tensor?[]",
    float: "float", float | None: "float?", list[float]: "float[]",
    int: "SymInt", int | None: "SymInt?", list[int]: "SymInt[]",
    bool: "bool", list[bool]: "bool[]", str: "str", str | None: "str?", str | Mapping[str, float]: "Dict(str, float)",
}  # fmt: skip

Gradient = Tensor | list[Tensor | None] | None


@dataclass(slots=True)
class Saved:
    """What backward gets: the inputs of an op, those tensors None that it does not save, and the results it saves.

    dtypes, needs: by the name of a differentiable field, a list where the field is one.
    """

    together: Callable[[], tuple[Any, ...]]
    backend: str
    results: Sequence[Tensor]
    dtypes: Mapping[str, Any]
    needs: Mapping[str, Any]

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The NamedTuples; put together only where backward asks for them."""
        return self.together()[:-1]


class _Fields:
    """The fields of the NamedTuples that an op takes: as a schema, and how they go there and back."""

    def __init__(self, op: str, takes: Sequence[type]) -> None:
        hints = [get_type_hints(inputs) for inputs in takes]
        self.takes = [(inputs, len(of_inputs)) for inputs, of_inputs in zip(takes, hints, strict=True)]
        fields = [field for of_inputs in hints for field in of_inputs.items()]
        self.names = [name for name, _ in fields]
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"{op}: two inputs have one name among {', '.join(self.names)}")
        self.kinds = [_TYPES[kind] for _, kind in fields]
        self.tensors = [i for i, kind in enumerate(self.kinds) if kind.startswith("Tensor")]
        self.others = [i for i in range(len(self.names) + 1) if i not in self.tensors]  # and the backend
        self.lists = {i for i in self.tensors if self.kinds[i].endswith("[]")}

    def schema(self, results: str, mutates: Sequence[str] = ()) -> str:
        """ "(fields, str backend) -> results", with those that are written into marked."""
        kinds = [
            f"{kind}(a{i}!)" if name in mutates else kind
            for i, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True))
        ]
        fields = [f"{kind} {name}" for kind, name in zip(kinds, self.names, strict=True)]
        return f"({', '.join([*fields, 'str backend'])}) -> {results}"

    def apart(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """The fields one after the other, and the backend, of (*NamedTuples, backend)."""
        flat: tuple[Any, ...] = ()
        for inputs in arguments[:-1]:
            flat += inputs if isinstance(inputs, tuple) else inputs.values()  # faster than a comprehension
        return flat + arguments[-1:]

    def together(self, flat: Sequence[Any]) -> tuple[Any, ...]:
        """(*NamedTuples, backend) of what `apart` gives."""
        arguments, start = [], 0
        for inputs, count in self.takes:
            arguments.append(inputs(*flat[start : start + count]))
            start += count
        return (*arguments, flat[-1])

    def picks(self, places: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """flat -> the tensors, or None, at these places of it, those of lists among them."""
        if self.lists.intersection(places):
            return lambda flat: [x for i in places for x in (flat[i] if i in self.lists else (flat[i],))]
        if len(places) > 1:
            return itemgetter(*places)  # faster than a comprehension
        return lambda flat: [flat[i] for i in places]


def only_autograd_looks(tensors: Iterable[Any]) -> bool:
    """Whether no compiler, mode, transform or tensor subclass is there, which must see the registered op.

    Nor forward-mode differentiation, nor a negated view (of the imaginary part of a conjugate): the dispatcher makes a
    tensor of it.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or is_in_torch_dispatch_mode():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    for x in tensors:  # faster than all(...)
        if x is not None and ((type(x) is not Tensor and type(x) is not Parameter) or x.is_neg()):
            return False
    return True


def filled(impls: Mapping[str, Callable[..., None]], empty: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """(*inputs, backend) -> the tensors that `empty` makes of these, filled by impls[backend](*inputs, tensors)."""

    def compute(*arguments: Any) -> list[Tensor]:
        results = empty(*arguments)
        impls[arguments[-1]](*arguments[:-1], results)
        return results

    return compute


def op_without_gradient(
    name: str, takes: Sequence[type], compute: Callable[..., Any], *, fake: Callable[..., Any],
    mutates: Sequence[str] = (), instead_of_vmap: str = INSTEAD,
) -> Callable[..., Any]:  # fmt: skip
    """Registers ``rlhf_fast::<name>``, which has no derivative, and returns how to call it.

    takes, compute, fake: as in `op`. mutates: the fields that compute writes into, in which case it returns nothing.
    instead_of_vmap: what to do.
    """
    fields = _Fields(name, takes)
    registered = torch.library.custom_op(
        f"rlhf_fast::{name}", lambda *flat: compute(*fields.together(flat)), mutates_args=mutates,
        schema=fields.schema("()" if mutates else "Tensor[]", mutates),
    )  # fmt: skip
    registered.register_fake(lambda *flat: fake(*fields.together(flat)))
    _refuse_vmap(name, instead_of_vmap)
    pick_tensors = fields.picks(fields.tensors)

    def call(*arguments: Any) -> Any:
        flat = fields.apart(arguments)
        if torch.compiler.is_compiling() or not only_autograd_looks(pick_tensors(flat)):
            return registered(*flat)
        return compute(*arguments)

    return call


def op(
    name: str, takes: Sequence[type], compute: Callable[..., list[Tensor]], *, fake: Callable[..., list[Tensor]],
    differentiable: Sequence[str], backward: Callable[[Saved, Sequence[Tensor | None]], Mapping[str, Gradient]],
    returned: int, saves: Sequence[str] = (), saves_results: slice = slice(None),
    without_gradient: Callable[..., list[Tensor]] | None = None, saves_gradients: bool = False,
) -> Callable[..., list[Tensor]]:  # fmt: skip
    """Registers ``rlhf_fast::<name>`` and returns how to call it, as compute: (*inputs, backend) -> results.

    takes: the NamedTuples of the inputs, or an Objective. Their fields, in order, are the schema, and after them the
    backend's name.
    compute, fake: -> the results, and empty ones of their shapes.
    differentiable: the fields that may have a gradient, tensors or lists of them.
    backward(saved, gradients of the results, not all of them None) -> the gradient of each field that has one, by name.
    saves, saves_results: which fields and which of the results backward reads.
    returned: how many of the results, the first ones, callers see; they may write into them. The others are kept.
    without_gradient: the computation of an eager call where none of them requires a gradient; `compute` by default.
    saves_gradients: the first result is a loss, and the results that are saved, where they are one for each
    differentiable field, are its gradients: under the 1 of loss.backward() they are handed through without `backward`.
    """
    fields = _Fields(name, takes)
    places = [fields.names.index(field) for field in differentiable]
    saved_places = [fields.names.index(field) for field in saves]
    has_lists = not fields.lists.isdisjoint(places)
    pick_tensors, pick_differentiable, pick_saved = map(fields.picks, (fields.tensors, places, saved_places))
    pick_others = fields.picks(fields.others)
    may_read_returned = bool(saves) or (saves_results.start or 0) < returned

    def save(ctx: Any, flat: Sequence[Any], results: Sequence[Tensor]) -> None:
        ctx.set_materialize_grads(False)
        tensors = pick_saved(flat)
        ctx.save_for_backward(*tensors, *results[saves_results])
        ctx.saved_inputs = len(tensors)
        ctx.dtypes = [None if x is None else x.dtype for x in pick_differentiable(flat)]
        ctx.others = pick_others(flat)
        if fields.lists:
            ctx.lengths = {i: len(flat[i]) for i in fields.lists}

    def together(ctx: Any, saved_tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        tensors = iter(saved_tensors)
        flat: list[Any] = [None] * (len(fields.names) + 1)
        for i, x in zip(fields.others, ctx.others, strict=True):
            flat[i] = x
        for i in saved_places:
            flat[i] = [next(tensors) for _ in range(ctx.lengths[i])] if i in fields.lists else next(tensors)
        return fields.together(flat)

    def by_field(ctx: Any, each: Sequence[Any]) -> dict[str, Any]:
        """`each`, one for each differentiable tensor, by the names of the fields."""
        if not has_lists:
            return dict(zip(differentiable, each, strict=True))
        rest = iter(each)
        return {
            field: [next(rest) for _ in range(ctx.lengths[i])] if i in fields.lists else next(rest)
            for field, i in zip(differentiable, places, strict=True)
        }

    def gradients(ctx: Any, saved_tensors: Sequence[Tensor], upstream: Sequence[Tensor | None]) -> list[Tensor | None]:
        """In the order of the differentiable fields, the tensors of a list one after the other."""
        needs = ctx.needs_input_grad[:-3]
        if all([g is None for g in upstream]):
            return [None] * len(needs)
        by_name = backward(
            Saved(
                lambda: together(ctx, saved_tensors), ctx.others[-1], saved_tensors[ctx.saved_inputs :],
                by_field(ctx, ctx.dtypes), by_field(ctx, needs),
            ),
            upstream,
        )  # fmt: skip
        if not has_lists:
            return [by_name.get(field) if needed else None for field, needed in zip(differentiable, needs, strict=True)]  # type: ignore[misc]
        padded: list[Any] = []
        for field, i in zip(differentiable, places, strict=True):
            gradient = by_name.get(field)
            if i not in fields.lists:
                padded.append(gradient)
            else:
                padded += [None] * ctx.lengths[i] if gradient is None else gradient
        return [gradient if needed else None for gradient, needed in zip(padded, needs, strict=True)]

    def handed_through(ctx: Any, saved_tensors: Sequence[Tensor], upstream: Tensor | None) -> bool:
        """Autograd keeps the version of what it saved: who writes into such a gradient and goes backward again gets an
        error, and it drops those that are not needed."""
        dtypes = ctx.dtypes
        return (
            len(saved_tensors) == len(dtypes)
            and is_one(upstream)
            and all([x.dtype == dtype for x, dtype in zip(saved_tensors, dtypes, strict=True)])
        )

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
            flat, run, arguments = given[-3:]  # the others are what autograd looks at; it takes its time for each
            results = run(*arguments)
            save(ctx, flat, results)
            if not may_read_returned:
                return tuple(results)
            # What backward reads is no tensor that a caller could write into.
            read = {id(x) for x in ctx.to_save or ()}
            return tuple([x.clone() if i < returned and id(x) in read else x for i, x in enumerate(results)])

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            saved_tensors = ctx.saved_tensors  # read once: a recomputed pass gives them no second time
            if not torch.is_grad_enabled():
                if saves_gradients and handed_through(ctx, saved_tensors, upstream[0]):
                    return *saved_tensors, None, None, None
                return *gradients(ctx, saved_tensors, upstream), None, None, None
            with torch.no_grad():
                each = gradients(ctx, saved_tensors, upstream)
            return *_once(name, each, (*upstream, *saved_tensors)), None, None, None

    qualified = f"rlhf_fast::{name}"
    torch.library.define(qualified, fields.schema("Tensor[]"))
    registered = getattr(torch.ops.rlhf_fast, name)

    def below_autograd(*flat: Any) -> list[Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*flat)

    def differentiated(*flat: Any) -> list[Tensor]:
        inputs = pick_differentiable(flat)
        _refuse_tangents(name, inputs)
        if torch._C._are_functorch_transforms_active():
            _refuse_torch_func(name, inputs)
            return below_autograd(*flat)
        return list(Differentiable.apply(*inputs, flat, below_autograd, flat))

    torch.library.impl(qualified, "CompositeExplicitAutograd")(lambda *flat: compute(*fields.together(flat)))
    torch.library.impl(qualified, "Autograd")(differentiated)
    torch.library.register_fake(qualified)(lambda *flat: fake(*fields.together(flat)))
    _refuse_vmap(name)

    # Function.apply looks for what `only_autograd_looks` has excluded, argument by argument.
    apply = super(torch.autograd.Function, Differentiable).apply

    def call(*arguments: Any) -> list[Tensor]:
        flat = fields.apart(arguments)
        if torch.compiler.is_compiling() or not only_autograd_looks(pick_tensors(flat)):
            return registered(*flat)
        if torch.is_grad_enabled():
            inputs = pick_differentiable(flat)
            if any([x is not None and x.requires_grad for x in inputs]):
                return apply(*inputs, flat, compute, arguments)
        return (without_gradient or compute)(*arguments)

    return call


def is_one(upstream: Tensor | None) -> bool:
    """Whether it is the 1 of loss.backward(), where that can be seen without waiting: on the CPU."""
    if upstream is None or type(upstream) is not Tensor or upstream.dim() > 0 or upstream.device.type != "cpu":
        return False
    return upstream.item() == 1


def _refuse_tangents(name: str, tensors: Iterable[Any]) -> None:
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(f"rlhf_fast::{name} has no forward-mode derivative; {INSTEAD}")


def _refuse_torch_func(name: str, tensors: Iterable[Any]) -> None:
    if any(x is not None and x.requires_grad for x in tensors):
        raise NotImplementedError(f"rlhf_fast::{name} cannot be differentiated by torch.func; {INSTEAD}")


def _refuse_vmap(name: str, instead: str = INSTEAD) -> None:
    def refuse(info: Any, in_dims: Any, *arguments: Any) -> Any:
        raise NotImplementedError(f"rlhf_fast::{name} has no rule for torch.vmap; {instead}")

    torch.library.register_vmap(f"rlhf_fast::{name}", refuse)


def _once(name: str, gradients: Sequence[Tensor | None], of: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients, which depend on `of`; who differentiates them gets an error."""
    sources = [x for x in of if x is not None and x.requires_grad]
    present = [x for x in gradients if x is not None]
    if not sources or not present:
        return list(gradients)
    marked = iter(_Once.apply(name, len(present), *present, *sources))
    return [None if x is None else next(marked) for x in gradients]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"rlhf_fast::{ctx.name} has no second derivative; {INSTEAD}")
