"""Forms of a divergence over a large vocabulary, for `benchmarks.loss`: hidden states and heads in, gradients out.

Each form leaves gradients in the student's hidden states and head, as a training step wants them. `naive` keeps all logits;
`checkpointed` recomputes each chunk in the backward pass; `liger` takes gradients chunk by chunk inside the forward pass by
torch.func, as Liger Kernel's `chunked_loss` does (its published form in torch, written anew); `trl` is TRL's own function.
"""

import resource
from collections.abc import Callable
from typing import Any

from benchmarks.worker import peak_rss, timed

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
CHUNK = 256


def work(
    form: str, divergence: str, vocab: int, hidden: int, tokens: int, threads: int, checked: int
) -> dict[str, Any]:
    """Seconds of forward and backward, the memory that it took beyond what stood before and the head's gradient, and how far the
    loss of `checked` tokens is from float64."""
    import torch

    torch.set_num_threads(threads)
    one = Inputs(vocab, hidden, tokens)
    if form == "products":
        products(Inputs(64, 8, 4))
        return timed(lambda: products(one))
    run = FORMS[form]
    run(Inputs(64, 8, 4), divergence)  # loads what it loads
    one.student.grad, one.states.grad = None, None
    before = resident()
    _forget_peak()
    spent = timed(lambda: run(one, divergence))
    extra = peak_rss() - before - one.student.nbytes  # beyond the head's gradient, which every form must leave
    assert one.student.grad is not None and one.states.grad is not None
    small = Inputs(vocab, hidden, checked)
    got = float(run(small, divergence)) / checked
    return {**spent, "extra": extra, "error": abs(got - exact(small, divergence))}


class Inputs:
    """Hidden states of a student and a teacher, and their heads; the teacher is the student, moved a little."""

    def __init__(self, vocab: int, hidden: int, tokens: int):
        import torch

        torch.manual_seed(0)
        self.student = torch.nn.Parameter(torch.randn(vocab, hidden) * hidden**-0.5 * 2)
        self.teacher = self.student.detach() + 0.3 * hidden**-0.5 * torch.randn(vocab, hidden)
        self.states = torch.randn(tokens, hidden, requires_grad=True)
        self.teacher_states = self.states.detach() + 0.1 * torch.randn(tokens, hidden)
        self.vocab, self.hidden, self.tokens = vocab, hidden, tokens


def resident() -> int:
    """The resident set of this process, in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _forget_peak() -> None:
    """Let the largest resident set begin anew (Linux)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def products(one: Inputs) -> None:
    """The four matrix products that no form can leave out, by the library that kibitz takes: both heads, and the two gradients of
    the student's; in chunks, so that they fit anywhere."""
    import torch

    from kibitz.losses.products import add_product, product

    with torch.no_grad():
        total = torch.zeros_like(one.student)
        for start in range(0, one.tokens, CHUNK):
            part = slice(start, start + CHUNK)
            logits = product(one.states[part], one.student.T)
            _ = product(one.teacher_states[part], one.teacher.T)
            _ = product(logits, one.student)
            add_product(total, logits.T, one.states[part])


def exact(one: Inputs, divergence: str) -> float:
    """Nats a token in float64."""
    import torch

    with torch.no_grad():
        student = (one.states.double() @ one.student.double().T).log_softmax(-1)
        teacher = (one.teacher_states.double() @ one.teacher.double().T).log_softmax(-1)
        return float(formula(student, teacher, divergence).mean())


def formula(student: Any, teacher: Any, divergence: str) -> Any:
    """GKD's divergences of log-probabilities `[T, V]`, the Jensen-Shannon one as published: one number for each token."""
    import torch

    def kl(one: Any, other: Any) -> Any:
        return (one.exp() * (one - other)).sum(-1)

    if divergence == "reverse_kl":
        return kl(student, teacher)
    if divergence == "forward_kl":
        return kl(teacher, student)
    mixed = torch.logaddexp(student, teacher) - 0.6931471805599453
    return 0.5 * kl(teacher, mixed) + 0.5 * kl(student, mixed)


# ------------------------------------------------------------------ forms


def _from_hidden(states: Any, head: Any, teacher_states: Any, teacher: Any, divergence: str) -> Any:
    student_logp = (states @ head.T).log_softmax(-1)
    return formula(student_logp, (teacher_states @ teacher.T).log_softmax(-1), divergence).sum()


def naive(one: Inputs, divergence: str) -> Any:
    loss = _from_hidden(one.states, one.student, one.teacher_states, one.teacher, divergence)
    loss.backward()
    return loss.detach()


def checkpointed(one: Inputs, divergence: str) -> Any:
    from torch.utils.checkpoint import checkpoint

    loss: Any = 0.0
    for start in range(0, one.tokens, CHUNK):
        part = slice(start, start + CHUNK)
        given = (one.states[part], one.student, one.teacher_states[part], one.teacher, divergence)
        loss = loss + checkpoint(_from_hidden, *given, use_reentrant=False)
    loss.backward()
    return loss.detach()


def liger(one: Inputs, divergence: str) -> Any:
    import torch

    def chunk(states: Any, head: Any, teacher_states: Any) -> Any:
        return _from_hidden(states, head, teacher_states, one.teacher, divergence)

    head, states = one.student.detach(), one.states.detach()
    head_grad, parts, loss = torch.zeros_like(head), [], torch.zeros(())
    step = torch.func.grad_and_value(chunk, argnums=(0, 1))
    for start in range(0, one.tokens, CHUNK):
        part = slice(start, start + CHUNK)
        (states_grad, grad), value = step(states[part], head, one.teacher_states[part])
        head_grad += grad
        parts.append(states_grad)
        loss += value
    one.student.grad, one.states.grad = head_grad, torch.cat(parts)
    return loss


def trl(one: Inputs, divergence: str) -> Any:
    from trl.trainer.distillation_trainer import ChunkedDivergenceFunction  # pyright: ignore[reportMissingImports]

    heads = (one.states, one.student, None, one.teacher_states, one.teacher, None)
    loss = ChunkedDivergenceFunction.apply(*heads, BETA[divergence], 1.0, 1.0, None, 1.0, None)[0].sum()
    loss.backward()
    return loss.detach()


def kibitz(one: Inputs, divergence: str) -> Any:
    """`over_chunks` with the criterion of a run, its metrics among it, in chunks as large as a run makes them."""
    from functools import partial

    import torch

    from kibitz.losses import criteria, divergences
    from kibitz.losses.chunked import over_chunks
    from kibitz.models.head import Head, keep_float32
    from kibitz.signals import Dense, Tokens
    from kibitz.training.means import num_measured

    plain = {"jsd": partial(divergences.jsd, beta=0.5, plain=True)}
    fn = plain.get(divergence) or getattr(divergences, divergence)
    layers = [torch.nn.Linear(one.hidden, one.vocab, bias=False, device="meta") for _ in range(2)]
    layers[0].weight, layers[1].weight = one.student, torch.nn.Parameter(one.teacher, requires_grad=False)
    for layer in layers:
        keep_float32(layer)
    heads = [Head(layer, one.vocab) for layer in layers]
    tokens = Tokens(
        token_T=torch.randint(one.vocab, (one.tokens,)), logp_T=torch.zeros(one.tokens), weight_T=torch.ones(one.tokens),
        signal=Dense(one.teacher_states, heads[1]), every=max(1, -(-one.tokens // num_measured(one.vocab))),
    )  # fmt: skip
    loss, _ = over_chunks(criteria.Divergence(fn), one.states, heads[0], tokens, _chunk_tokens(one))
    loss.backward()
    return loss.detach()


def _chunk_tokens(one: Inputs) -> int:
    """What a run takes for this vocabulary."""
    from types import SimpleNamespace

    from kibitz.models.language_model import LanguageModel

    prop: Any = LanguageModel.__dict__["chunk_tokens"]
    return prop.fget(SimpleNamespace(vocab_size=one.vocab, width=one.hidden, hidden_size=one.hidden))


FORMS: dict[str, Callable[[Inputs, str], Any]] = {
    "naive": naive,
    "checkpointed": checkpointed,
    "liger": liger,
    "trl": trl,
    "kibitz": kibitz,
}
