"""Every rpc that is built, attacked with messages made from its descriptor and with bytes that are no message."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from test_framework.loop_thread import LoopThread
from test_framework.stack import Stack
from tests.contract.matrix_calls import BUILT, SILENT, Rpc
from tests.fuzz.attacker import CREDENTIALS, Attacker, Call, words_of
from tests.fuzz.conftest import AT_A_TIME, LONG, Attack
from tests.fuzz.messages import Vocabulary
from tests.fuzz.witness import Witness

pytestmark = [pytest.mark.fuzz, pytest.mark.real_services, pytest.mark.security]

FRAMES_MAX = 3
CHECK_SECONDS = 120.0
# Ids are new in each run, and so is which rpcs a history happens to ask in the right way: most of them.
UNLUCKY_SHARE = 1 / 3


def test_an_attacked_rpc_answers_with_a_reason_and_nothing_is_left_behind(
    fuzz_stack: Stack, fuzz_loop: LoopThread, attacks: Callable[[Attack], Attack], tell: Callable[[str], None]
) -> None:
    witness = fuzz_loop.run(Witness.begin(fuzz_stack))
    attacker = fuzz_loop.run(Attacker.begin(fuzz_stack))
    vocabulary = Vocabulary(words_of(attacker, asdict(witness.bystander)))
    count = 0

    @st.composite
    def calls(draw: Callable[[st.SearchStrategy[Any]], Any]) -> Call:  # Any: what a strategy makes
        rpc: Rpc = draw(st.sampled_from(BUILT))
        frames_max = FRAMES_MAX if rpc.method.client_streaming else 1
        frames = draw(st.lists(vocabulary.wire(rpc.method.input_type), min_size=1, max_size=frames_max))
        return Call(rpc, frames, draw(st.sampled_from(CREDENTIALS)))

    @attacks
    @given(st.lists(calls(), min_size=AT_A_TIME, max_size=AT_A_TIME))
    def attack(batch: list[Call]) -> None:
        nonlocal count
        count += len(batch)
        assert [fault for faults in threads.map(attacker.send, batch) for fault in faults] == []

    with ThreadPoolExecutor(AT_A_TIME) as threads, closing(attacker):
        attack()
    # An attack that is refused at the door everywhere would show nothing.
    unanswered = {rpc.name for rpc in BUILT} - attacker.answered.keys() - SILENT
    assert count < LONG or len(unanswered) <= UNLUCKY_SHARE * len(BUILT), unanswered
    growth = fuzz_loop.run(witness.check(attacker.streams), CHECK_SECONDS)
    tell(f"{count} calls, {attacker.answered.total()} answered; {growth}")
