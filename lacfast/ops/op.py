"""An op from its records: kernels of every backend, autograd, and torch's dispatcher, each by one mechanism.

An op reads one NamedTuple and fills another. The fields of the inputs are the schema that torch.compile sees;
autograd keeps fields by their names; a kernel of any backend takes the two records and, for a gradient, the
inputs and outputs that were kept, the outputs' gradients, and a record of the inputs' gradients to fill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from lacfast.ops.backend import add_kernel, chosen_for, extension, launch, through_dispatcher

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = TypeVar("Outputs", bound=tuple[Any, ...])
Gradients = Sequence[Tensor | None]
Sized = Annotated[Tensor, "sizes"]
"""A tensor whose sizes C++ reads too."""

# Type of a field -> its name in torch's schemas, and its kind in the words of a C++ record.
_KINDS: dict[Any, tuple[str, str]] = {
    Tensor: ("Tensor", "t"),
    Sized: ("Tensor", "s"),
    Tensor | None: ("Tensor?", "t"),
    float: ("float", "d"),
    bool: ("bool", "i"),
    list[int]: ("int[]", "I"),
    list[float]: ("float[]", "D"),
}


def words_format(record: type[tuple[Any, ...]]) -> str:
    """One character per field, by which C++ reads it."""
    return "".join(_KINDS[kind][1] for _, kind in _typed(record))


def schema_of(*records: type[tuple[Any, ...]], mutates: Sequence[str] = ()) -> list[str]:
    """The fields of records as arguments of torch's schema language."""
    fields = [field for record in records for field in _typed(record)]
    marks = {name: f"Tensor(a{i}!)" for i, name in enumerate(mutates)}
    return [f"{marks.get(name, _KINDS[kind][0])} {name}" for name, kind in fields]


class Ahead(NamedTuple):
    """The one gradient that C++ makes together with the loss, where the loss's own is `outer`."""

    gradient: Tensor
    outer: float


class Op(Generic[Inputs, Outputs]):
    """The function of a kernel: Inputs -> Outputs, with its gradient.

    Args:
        name: of the kernel on every backend; that of its gradient is NAME_backward.
        inputs: the record that it reads. The first field is a tensor on the device of all.
        outputs: the record of tensors that it fills; None where one is not made.
        allocate: empty outputs for given inputs.
        triton: module of lacfast.kernels with its kernel, and that of the gradient.
        cuda: whether there is a kernel in CUDA C++.
        gradients: the inputs that have a gradient.
        keeps: what the backward pass reads of inputs and outputs, besides numbers.
        statistics: the outputs that have no gradient.
        all_gradients: its kernel fills all gradients, wanted or not.
        formula: in place of a kernel: gradients from kept inputs and outputs, and the outputs' gradients.
        makes_gradient: whether NAME_and_gradient in C++ makes outputs and the one gradient together.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        outputs: type[Outputs],
        allocate: Callable[[Inputs], Outputs],
        *,
        triton: tuple[str, ...] = (),
        cuda: bool = False,
        gradients: tuple[str, ...] = (),
        keeps: tuple[str, ...] = (),
        statistics: tuple[str, ...] = (),
        all_gradients: bool = False,
        formula: Callable[[Inputs, Outputs, Gradients], Gradients] | None = None,
        makes_gradient: bool = False,
    ) -> None:
        self.name, self._gradient = name, f"{name}_backward"
        self._both, self._makes_gradient = f"{name}_and_gradient", makes_gradient
        # A loss has the same gradient again and again: 1, or a microbatch's share.
        self._expected = 1.0
        # Records from sequences of fields.
        self.inputs: Callable[[Iterable[Any]], Inputs] = inputs._make  # type: ignore[attr-defined]
        self.outputs: Callable[[Iterable[Any]], Outputs] = outputs._make  # type: ignore[attr-defined]
        self._allocate, self._formula, self._all_gradients = allocate, formula, all_gradients
        formats = [words_format(inputs), words_format(outputs)]
        add_kernel(name, formats, triton=triton[:1], cuda=cuda)
        if gradients and formula is None:
            add_kernel(self._gradient, formats + formats[::-1], triton=triton[1:], cuda=cuda)
        if makes_gradient:
            add_kernel(self._both, [*formats, words_format(Ahead)])
        fields, results = _names(inputs), _names(outputs)
        numbers = [name for name, kind in _typed(inputs) if _KINDS[kind][1] not in "ts"]
        self._trained = [fields.index(name) for name in gradients]
        self._kept_inputs = [i for i, name in enumerate(fields) if name in keeps]
        self._kept_outputs = [i for i, name in enumerate(results) if name in keeps]
        self._numbers = [fields.index(name) for name in numbers]
        self._statistics = [results.index(name) for name in statistics]
        self._differentiable = [i for i in range(len(results)) if i not in self._statistics]
        self._select_trained = _selection(self._trained)
        self._select_numbers = _selection(self._numbers)
        self._select_kept_inputs = _selection(self._kept_inputs)
        self._select_kept_outputs = _selection(self._kept_outputs)
        self._select_statistics = _selection(self._statistics)
        self.select_differentiable = _selection(self._differentiable)
        # Of the differentiable ones and then all; of their gradients and then None.
        order = [*self._differentiable, *range(len(results))]
        self._select_traced = _selection([order.index(i) for i in range(len(results))])
        self._select_grads = _selection(
            [-1 if i in self._statistics else order.index(i) for i in range(len(results))]
        )
        self._no_gradients = [0 if name in numbers else None for name in fields]
        # Where each field lies among what is kept, tensors before numbers; what is not is None, the last.
        kept = [name for name in (*fields, *results) if name in keeps] + numbers
        self._select_inputs, self._select_outputs = (
            _selection([kept.index(name) if name in kept else -1 for name in record])
            for record in (fields, results)
        )
        self._registered = self._register(schema_of(inputs), results)

    def __call__(self, chosen: str, inputs: Inputs) -> Outputs:
        """The outputs, by the kernel of backend `chosen`."""
        if through_dispatcher(inputs[0]):
            # Else the outputs of an op without gradients would require one, and raise when it is asked for.
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(self._trained)):
                return self.outputs(_decoded(self._registered(*inputs)))
        if self._trained and torch.is_grad_enabled():
            trained = self._select_trained(inputs)
            for tensor in trained:
                if tensor is not None and tensor.requires_grad:
                    return self._traced(chosen, inputs, trained)
        return self.run(chosen, inputs)

    def _traced(self, chosen: str, inputs: Inputs, trained: Sequence[Tensor | None]) -> Outputs:
        """The outputs with their gradient: autograd sees those that have one, the others pass beside it."""
        beside: list[Outputs] = []
        apply: Callable[..., Any] = _Direct.apply if functorch_is_active() else _plain_apply
        differentiable = apply(self, chosen, inputs, beside, *trained)
        if not self._statistics:
            return self.outputs(differentiable)
        return self.outputs(self._select_traced((*differentiable, *beside[0])))

    def run(self, chosen: str, inputs: Inputs) -> Outputs:
        """The kernel alone."""
        outputs = self._allocate(inputs)
        launch(chosen, self.name, inputs[0], inputs, outputs)
        return outputs

    def run_ahead(self, chosen: str, inputs: Inputs) -> tuple[Outputs, Ahead | None]:
        """`run`, and where a kernel makes both the gradient too, for the last backward pass' own of the loss.

        Another one than that is rare, and then the gradient is made anew: the results are the same bits.
        """
        if not self._makes_gradient or chosen != "cpu":
            return self.run(chosen, inputs), None
        outputs = self._allocate(inputs)
        ahead = Ahead(torch.empty_like(inputs[self._trained[0]]), self._expected)
        launch(chosen, self._both, inputs[0], inputs, outputs, ahead)
        return outputs, ahead

    def keep(self, ctx: Any, inputs: Inputs, outputs: Sequence[Tensor | None]) -> None:
        """Leave to the backward pass what it needs."""
        # Tensors go through autograd, which notices one that was written in between.
        ctx.save_for_backward(*self._select_kept_inputs(inputs), *self._select_kept_outputs(outputs))
        ctx.numbers = self._select_numbers(inputs)
        if self._statistics or self._formula is not None:
            # Else autograd makes zeros for the statistics, and for gradients that a formula can do without.
            ctx.set_materialize_grads(False)

    def gradients(
        self, chosen: str | None, kept: Sequence[Any], grads: Gradients, wanted: Sequence[bool]
    ) -> Gradients:
        """The trained inputs' gradients by a kernel, or empty without one; `kept`: tensors, then numbers."""
        inputs, outputs = self._restored(kept)
        results: list[Any] = self._no_gradients.copy()
        for i, is_wanted in zip(self._trained, wanted, strict=True):
            if is_wanted or (self._all_gradients and inputs[i] is not None):
                results[i] = torch.empty_like(inputs[i])
        if chosen is not None:
            contiguous = self.outputs([None if grad is None else grad.contiguous() for grad in grads])
            records = (inputs, outputs, contiguous, self.inputs(results))
            launch(chosen, self._gradient, inputs[self._kept_inputs[0]], *records)
        return self._select_trained(results)

    def of_outputs(self, grads: Gradients) -> Gradients:
        """A gradient, or None, for every output from those of the differentiable ones."""
        return self._select_grads((*grads, None)) if self._statistics else grads

    def backward(self, ctx: Any, chosen: str | None, grads: Gradients, wanted: Sequence[bool]) -> Gradients:
        """The trained inputs' gradients, by those of the outputs; without a backend by the registered op."""
        for grad in grads:
            if grad is not None:
                break
        else:
            return [None] * len(wanted)
        kept = (*ctx.saved_tensors, *ctx.numbers)
        if self._formula is not None:
            return self._formula(*self._restored(kept), grads)
        if chosen is not None:
            gradient = self._made_ahead(ctx, grads[0]) if self._makes_gradient else None
            return self.gradients(chosen, kept, grads, wanted) if gradient is None else [gradient]
        statistics = [None if i in self._statistics else grad for i, grad in enumerate(grads)]
        results = _decoded(self._registered_backward(*kept, *statistics, list(wanted)))
        return [result if is_wanted else None for result, is_wanted in zip(results, wanted, strict=True)]

    def _made_ahead(self, ctx: Any, outer: Tensor | None) -> Tensor | None:
        """The forward pass' gradient, handed over once: a second backward pass must not share its memory."""
        ahead: Ahead | None = vars(ctx).pop("ahead", None)
        if ahead is None or outer is None:
            return None
        self._expected = extension().number(outer)
        return ahead.gradient if self._expected == ahead.outer else None

    def chosen(self, tensor: Tensor) -> str:
        """The backend for inputs of this device and dtype."""
        return chosen_for(self.name, tensor)

    def _restored(self, kept: Sequence[Any]) -> tuple[Inputs, Outputs]:
        """The two records of the forward pass, with None for what was not kept."""
        values = (*kept, None)
        return self.inputs(self._select_inputs(values)), self.outputs(self._select_outputs(values))

    def _register(self, schema: list[str], results: tuple[str, ...]) -> Callable[..., Any]:
        """Make the op known to torch's dispatcher: it runs where torch looks at what is called."""

        def forward(*fields: Any) -> Any:
            return _encoded(self.run(self.chosen(fields[0]), self.inputs(fields)), fields[0])

        def fake(*fields: Any) -> Any:
            return _encoded(self._allocate(self.inputs(fields)), fields[0])

        op = _registered(self.name, schema, len(results), forward, fake)
        registered: Callable[..., Any] = op
        if not self._trained:
            return registered

        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            outputs = _decoded(output)
            self.keep(ctx, self.inputs(inputs), outputs)
            if self._statistics:
                statistics = self._select_statistics(outputs)
                ctx.mark_non_differentiable(*[tensor for tensor in statistics if tensor is not None])

        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            wanted = [ctx.needs_input_grad[i] for i in self._trained]
            by_field = dict(zip(self._trained, self.backward(ctx, None, grads, wanted), strict=True))
            return tuple(by_field.get(i) for i in range(len(schema)))

        op.register_autograd(backward, setup_context=setup_context)
        if self._formula is None:
            self._registered_backward = self._register_backward(schema, results)
        return registered

    def _register_backward(self, schema: list[str], results: tuple[str, ...]) -> Callable[..., Any]:
        kept = [schema[i].replace("Tensor ", "Tensor? ") for i in self._kept_inputs]
        kept += [f"Tensor? {results[i]}" for i in self._kept_outputs]
        kept += [schema[i] for i in self._numbers]
        arguments = [*kept, *(f"Tensor? grad_{name}" for name in results), "bool[] wanted"]

        def gradients(chosen: str | None, values: tuple[Any, ...]) -> Any:
            *fields, wanted = values
            count = len(kept)
            return _encoded(self.gradients(chosen, fields[:count], fields[count:], wanted), fields[0])

        def run(*values: Any) -> Any:
            return gradients(self.chosen(values[0]), values)

        def fake(*values: Any) -> Any:
            return gradients(None, values)

        op: Callable[..., Any] = _registered(self._gradient, arguments, len(self._trained), run, fake)
        return op


class _Direct(torch.autograd.Function):
    """The path of eager calls.

    Autograd looks at each argument and result in turn: inputs come as one, and `beside` takes all outputs.
    """

    @staticmethod
    def forward(
        ctx: Any, op: Op[Any, Any], chosen: str, inputs: Any, beside: list[Any], *_: Tensor | None
    ) -> Any:
        outputs, ctx.ahead = op.run_ahead(chosen, inputs)
        op.keep(ctx, inputs, outputs)
        ctx.op, ctx.chosen = op, chosen
        beside.append(outputs)
        return op.select_differentiable(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        # Grad mode is on under create_graph alone; torch's wrapper costs each of the others 4 us.
        if torch.is_grad_enabled():
            return _once_differentiable(ctx, *grads)
        return _gradients(ctx, *grads)


# Outside of torch.func it is what `apply` calls in the end: the way there costs as much as a tensor.
_plain_apply: Callable[..., Any] = super(torch.autograd.Function, _Direct).apply
functorch_is_active: Callable[[], bool] = torch._C._are_functorch_transforms_active


def _gradients(ctx: Any, *grads: Tensor | None) -> Any:
    op = ctx.op
    return (
        None,
        None,
        None,
        None,
        *op.backward(ctx, ctx.chosen, op.of_outputs(grads), ctx.needs_input_grad[4:]),
    )


_once_differentiable = torch.autograd.function.once_differentiable(_gradients)


def _selection(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes these items of a sequence; a comprehension takes five times as long."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda items: tuple(items[i] for i in indices)


def _typed(record: type[tuple[Any, ...]]) -> list[tuple[str, Any]]:
    return list(get_type_hints(record, include_extras=True).items())


def _names(record: type[tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple(name for name, _ in _typed(record))


def _registered(
    name: str, arguments: list[str], results: int, run: Callable[..., Any], fake: Callable[..., Any]
) -> Any:
    returns = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    schema = f"({', '.join(arguments)}) -> {returns}"
    op = torch.library.custom_op(f"lacfast::{name}", run, mutates_args=(), schema=schema)
    op.register_fake(fake)
    return op


def _encoded(results: Sequence[Tensor | None], like: Tensor) -> Any:
    # A registered op cannot return None in a tensor's place.
    tensors = [like.new_empty(0) if result is None else result for result in results]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _decoded(results: Any) -> list[Tensor | None]:
    tensors = [results] if isinstance(results, Tensor) else results
    return [None if tensor.numel() == 0 else tensor for tensor in tensors]
