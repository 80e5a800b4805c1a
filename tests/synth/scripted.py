"""A model for tests of chains: it answers as a function says, and remembers what it was asked."""

import asyncio

from tanuki_jax.config.synthesis import Synth
from tanuki_jax.endpoint import Answer, Drop
from tanuki_jax.synth import methods, templates
from tanuki_jax.synth.asking import Context


class Scripted:
    """`answer` gets a job and gives text, an Answer, or an exception to raise."""

    def __init__(self, answer):
        self.answer, self.jobs = answer, []

    async def __call__(self, job):
        self.jobs.append(job)
        await asyncio.sleep(0)
        result = self.answer(job)
        if isinstance(result, Exception):
            raise result
        return Answer(text=result, finish_reason="stop") if isinstance(result, str) else result

    def last(self, job):
        return job.messages[-1]["content"]


def context(method, path="", **options):
    synth = Synth(method=method, **options)
    return Context(synth, templates.load(method, synth.language, path))


def rows(made_for, item, answer):
    """The rows of a chain, and what was asked for them."""
    ask = Scripted(answer)
    chain = methods.CHAINS[made_for.synth.method](made_for)
    return asyncio.run(chain({"id": "item", **item}, ask)), ask.jobs


def reason(made_for, item, answer):
    """Why a chain drops an item."""
    try:
        rows(made_for, item, answer)
    except Drop as drop:
        return drop.reason
    raise AssertionError("not dropped")
