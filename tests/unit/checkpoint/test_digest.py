"""The digest is about names, values and the config, and about nothing else."""

import hashlib
import threading

import pytest
import torch

from d2qconv.checkpoint.dense import Dense
from d2qconv.checkpoint.digest import content_digest
from d2qconv.names import Part, Role, TensorId

CONFIG = {"b": 1, "a": [2.5, None]}


def model(**changed):
    random = torch.Generator().manual_seed(0)
    tensors = {str(TensorId(Role.Q, i)): torch.randn(3, 5, generator=random) for i in range(20)}
    tensors[str(TensorId(Role.EMBED))] = torch.randn(50, 5, generator=random).bfloat16()
    tensors[str(TensorId(Role.Q, 0, Part.BIAS))] = torch.randn(3, generator=random).half()
    return {TensorId.parse(name): Dense.of(t) for name, t in (tensors | changed).items()}


def digest(tensors, config=CONFIG, n_threads=4):
    return content_digest(config, tensors, lambda done, name: None, n_threads=n_threads)


def test_written_out():
    tensors = {TensorId(Role.EMBED): Dense.of(torch.ones(2, 1)), TensorId(Role.Q, 1): Dense.of(torch.ones(1))}
    sha = hashlib.sha256(b'{"a":1}')
    for tensor_id, text in ((TensorId(Role.Q, 1), "(1,)"), (TensorId(Role.EMBED), "(2, 1)")):
        values = tensors[tensor_id].load().numpy().tobytes()
        sha.update(f"\n{tensor_id} torch.float32 {text}\n".encode() + hashlib.sha256(values).digest())
    assert digest(tensors, {"a": 1}) == sha.hexdigest()


def test_order_and_threads_do_not_count():
    tensors = model()
    backwards = dict(reversed(tensors.items()))
    assert digest(tensors) == digest(backwards, {"a": [2.5, None], "b": 1}, n_threads=1)


def test_every_part_counts():
    base = model()
    name = str(TensorId(Role.Q, 7))
    values = base[TensorId.parse(name)].load()
    spoiled = values.clone()
    spoiled.view(torch.int32)[2, 4] ^= 1
    others = [
        model(**{name: spoiled}),
        model(**{name: values.reshape(5, 3)}),
        model(**{name: values.bfloat16()}),
        {t: d for t, d in base.items() if str(t) != name},
        base | {TensorId(Role.Q, 21): base[TensorId.parse(name)]},
    ]
    found = {digest(tensors) for tensors in (base, *others)} | {digest(base, {**CONFIG, "b": 2})}
    assert len(found) == 7


def test_steps_come_in_the_callers_thread():
    steps, threads = [], set()

    def on_step(done, name):
        steps.append((done, name))
        threads.add(threading.get_ident())

    tensors = model()
    content_digest(CONFIG, tensors, on_step, n_threads=3)
    assert [done for done, _ in steps] == list(range(1, len(tensors) + 1))
    assert {name for _, name in steps} == set(map(str, tensors))
    assert threads == {threading.get_ident()}


def test_an_error_is_raised_as_it_is():
    class BrokenError(Exception):
        pass

    def read():
        raise BrokenError

    tensors = model() | {TensorId(Role.K, 3): Dense((4,), torch.float32, read)}
    with pytest.raises(BrokenError):
        digest(tensors)
