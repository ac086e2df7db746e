"""Under ``torch.compile``: codes shared by the linears of one input, and made in the kernel of the norm or gate before them.

This is a pass over the graph that Dynamo traces. It looks for ``quantkit::quantize``, and does two things:

- calls on the same tensor with the same arguments are merged (q, k and v; gate and up);
- a gate (``silu(a) * b``, ``gelu(a) * b``), an RMSNorm or a LayerNorm, with the residual sum in front of it, moves into the
  call that alone reads its result.

What Inductor fuses by itself would read a gate twice, and cannot hold a rotation. The fused kernel keeps float32 where separate
ones round to 16 bit in between.

:func:`install` sets Inductor's ``pre_grad_custom_pass``, which is one for the whole process. It is called when the operators
are imported, that is when a layer first runs on a GPU or in Triton's interpreter, and never by ``import quantkit``.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.nn import functional as F

VIEWS = ("reshape", "view", "contiguous", "flatten")
ALIASES = (
    *VIEWS,
    "transpose",
    "permute",
    "chunk",
    "split",
    "unbind",
    "narrow",
    "select",
    "squeeze",
    "unsqueeze",
    "expand",
    "t",
)


class Fuse(CustomGraphPass):
    """See the module."""

    def __call__(self, graph: fx.Graph) -> None:
        fuse(graph)

    def uuid(self) -> Any:
        """Of this file and of the operators: another version of either compiles anew."""
        return get_hash_for_files((__file__, __file__.replace("fuse.py", "operators.py")))


def install() -> None:
    """Add the pass to Inductor, unless somebody else's is there: without it the same is computed in more steps."""
    from torch._inductor import config

    if config.pre_grad_custom_pass is None:
        config.pre_grad_custom_pass = Fuse()


def fuse(graph: fx.Graph) -> None:
    """Rewrite ``graph`` in place."""
    if not calls_of(graph):
        return
    changing = changed_in_place(graph)
    merge(graph, changing)
    for call in calls_of(graph):
        gate(graph, call, changing) or norm(graph, call, changing)
    graph.eliminate_dead_code()


def calls_of(graph: fx.Graph) -> list[fx.Node]:
    """Calls of ``quantize``."""
    ours = (torch.ops.quantkit.quantize, torch.ops.quantkit.quantize.default)
    return [node for node in graph.nodes if node.op == "call_function" and node.target in ours]


def behind_views(node: fx.Node) -> fx.Node:
    """What ``node`` shows in another shape with the same last dimension."""
    while node.op == "call_method" and node.target in VIEWS and width(node) == width(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def example(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def width(node: Any) -> int | None:
    value = example(node)
    return None if value is None or not value.ndim else int(value.shape[-1])


def changed_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Tensors that some call writes to, and those that they are views of."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        in_place = name in ("setitem", "iadd", "isub", "imul", "itruediv") or (name.endswith("_") and not name.endswith("__"))
        written = [*node.args[:1]] if in_place or node.kwargs.get("inplace") else []
        written += [node.kwargs["out"]] if "out" in node.kwargs else []
        found.update(itertools.chain.from_iterable(map(aliased, written)))
    return found


def aliased(node: Any) -> Iterator[fx.Node]:
    """``node`` and the tensors that it is a view of."""
    while isinstance(node, fx.Node):
        yield node
        node = node.args[0] if is_call(node, *ALIASES, operator.getitem) else None


def steady(nodes: Iterable[Any], changing: set[fx.Node]) -> bool:
    """Whether nobody writes to these: a call that moves down then reads what it would have read."""
    return not any(part in changing for node in nodes for part in aliased(node))


def merge(graph: fx.Graph, changing: set[fx.Node]) -> None:
    """Let calls with the same input and arguments share the first one's result."""
    seen: dict[Any, fx.Node] = {}
    for call in calls_of(graph):
        if not steady([call.args[0]], changing):
            continue
        key = (behind_views(call.args[0]), tuple(sorted(call.kwargs.items(), key=lambda item: item[0])))  # type: ignore[arg-type]
        first = seen.setdefault(key, call)
        if first is not call:
            call.replace_all_uses_with(first)
            graph.erase_node(call)


def readers(node: fx.Node) -> set[fx.Node]:
    """Who reads ``node``, views looked through."""
    found: set[fx.Node] = set()
    for user in node.users:
        viewed = user.op == "call_method" and user.target in VIEWS and behind_views(user) is behind_views(node)
        found |= readers(user) if viewed else {user}
    return found


def alone(node: fx.Node, call: fx.Node) -> bool:
    """Whether ``call``, which takes no columns out before the kernel could, is all that reads ``node``."""
    plain = all(not call.kwargs.get(name) for name in ("source", "threshold", "side_index", "side_mask"))
    return plain and readers(node) == {call} and isinstance(example(node), torch.Tensor)


def is_call(node: Any, *targets: Any) -> bool:
    """Whether ``node`` calls one of these functions or methods."""
    return isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in targets


MULTIPLY = (operator.mul, torch.mul, "mul")
ADD = (operator.add, torch.add, "add")


def gate(graph: fx.Graph, call: fx.Node, changing: set[fx.Node]) -> bool:
    """``quantize(act(a) * b)`` to ``quantize(a, source=act, x2=b)``."""
    product = behind_views(call.args[0])  # type: ignore[arg-type]
    if not is_call(product, *MULTIPLY) or len(product.args) != 2 or not alone(product, call):
        return False
    for activated, other in (product.args, product.args[::-1]):
        source = activation(activated)
        if source and isinstance(other, fx.Node) and example(other) is not None:
            inner = activated.args[0]  # type: ignore[union-attr]
            shapes = [example(node).shape for node in (inner, other, product)]  # type: ignore[union-attr]
            if shapes[0] == shapes[1] == shapes[2] and steady([inner, other, activated, product], changing):
                replace(graph, call, inner, source=source, x2=other)
                return True
    return False


def activation(node: Any) -> str | None:
    """The kernel's name of an activation function."""
    if not isinstance(node, fx.Node) or len(node.args) != 1 or example(node.args[0]) is None:
        return None
    if is_call(node, F.silu, torch.ops.aten.silu.default):
        return "silu"
    if is_call(node, F.gelu, torch._C._nn.gelu):
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(node.kwargs.get("approximate", "none")))
    return None


def norm(graph: fx.Graph, call: fx.Node, changing: set[fx.Node]) -> bool:
    """``quantize(norm(x))`` to ``quantize(x, source="rms")``, or "layer", and with ``x = a + b`` to one that keeps the sum."""
    normed = behind_views(call.args[0])  # type: ignore[arg-type]
    found = norm_of(normed)
    if found is None or not alone(normed, call):
        return False
    x, arguments = found
    value, into = example(x), example(normed)
    if value is None or into is None or value.shape != into.shape or value.dtype != into.dtype:
        return False
    order = {node: index for index, node in enumerate(graph.nodes)}
    terms = x.args if is_call(x, *ADD) and len(x.args) == 2 and not x.kwargs else ()
    if not steady([x, *terms, *inside(normed, x)], changing):
        return False
    later = all((order[user] > order[x] and user in inside(normed, x)) or order[user] > order[call] for user in x.users)
    if later and all(_like(term, value) for term in terms) and terms:
        done = replace(graph, call, terms[0], x2=terms[1], **arguments)
        with graph.inserting_after(done):
            kept = graph.call_function(operator.getitem, (done, -1))
        with graph.inserting_after(kept):
            kept = graph.call_method("view_as", (kept, terms[0]))
        mine = inside(normed, x)
        x.replace_all_uses_with(kept, delete_user_cb=lambda user: user not in mine)
    else:
        replace(graph, call, x, **arguments)
    return True


def _like(term: Any, value: torch.Tensor) -> bool:
    other = example(term)
    return other is not None and other.shape == value.shape and other.dtype == value.dtype


def inside(result: fx.Node, start: fx.Node) -> set[fx.Node]:
    """Nodes by which ``result`` is computed from ``start``."""
    found: set[fx.Node] = set()
    waiting = [result]
    while waiting:
        node = waiting.pop()
        if node is not start and node not in found and node.op in ("call_function", "call_method"):
            found.add(node)
            waiting += node.all_input_nodes
    return found


def norm_of(node: fx.Node) -> tuple[fx.Node, dict[str, Any]] | None:
    """Input of a norm and what the kernel has to know of it: PyTorch's functions, or written out as transformers' models do."""
    for source, names, *targets in (
        ("rms", ("input", "normalized_shape", "weight", "eps"), F.rms_norm, torch.rms_norm),
        ("layer", ("input", "normalized_shape", "weight", "bias", "eps"), F.layer_norm, torch.layer_norm),
    ):
        if is_call(node, *targets):
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            known = isinstance(given.get("eps"), float) and len(given["normalized_shape"]) == 1  # type: ignore[arg-type]
            vectors = {"gain": given.get("weight"), "bias": given.get("bias")}
            return (given["input"], {"source": source, "eps": given["eps"], **vectors}) if known else None  # type: ignore[return-value]
    if is_call(node, *MULTIPLY):
        for weight, scaled in (node.args, node.args[::-1]):
            is_vector = (value := example(weight)) is not None and value.ndim == 1
            if is_vector and (found := written_out(scaled)):
                return found[0], {"source": "rms", "gain": weight, "eps": found[1]}
    return None


def written_out(node: Any) -> tuple[fx.Node, float] | None:
    """``x`` and ``eps`` of ``(x.float() * rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)).to(dtype)``."""
    node = without_cast(node)
    if not is_call(node, *MULTIPLY):
        return None
    for wide, root in (node.args, node.args[::-1]):
        if is_call(root, torch.rsqrt, "rsqrt") and is_call(root.args[0], *ADD):
            mean, eps = root.args[0].args
            if is_call(mean, "mean") and is_call(mean.args[0], "pow") and isinstance(eps, float):
                power = mean.args[0]
                last = mean.args[1:] == (-1,) and mean.kwargs == {"keepdim": True}
                if last and power.args == (wide, 2) and is_call(wide, "to", "float"):
                    return wide.args[0], eps
    return None


def without_cast(node: Any) -> Any:
    return node.args[0] if is_call(node, "to", "type_as", "float") else node


def replace(graph: fx.Graph, call: fx.Node, x: Any, **arguments: Any) -> fx.Node:
    """Another call in place of ``call``, on ``x`` and with these ``arguments`` more, inputs in rows."""
    k = width(behind_views(call.args[0]))  # type: ignore[arg-type]
    flat: Callable[[Any], fx.Node] = lambda node: graph.call_method("reshape", (node, -1, k))  # noqa: E731
    with graph.inserting_before(call):
        if "x2" in arguments:
            arguments["x2"] = flat(arguments["x2"])
        done = graph.call_function(call.target, (flat(x),), dict(call.kwargs) | arguments)  # type: ignore[arg-type]
    call.replace_all_uses_with(done)
    graph.erase_node(call)
    return done
