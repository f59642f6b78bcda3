"""What each instruction of a function refers to, found by following known numbers through its registers.

Position-independent code for most processors puts an address together: a page from ``adrp``, then an offset;
the GOT's address in ``ebx`` for a whole function.  So constants are propagated along every path through
the function, and what paths disagree on is not known: no name is better than a wrong one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, Literal

from miniloader.machine.processors import Processor, Value
from miniloader.values import dataclass

__all__ = ["Flow", "Memory", "Operand", "Reference", "Step", "references"]

Flow = Literal["next", "call", "branch", "jump", "stop"]
"""Where an instruction leads: to the next; there and back; there or to the next; there; nowhere."""


@dataclass(frozen=True)
class Memory:
    """A memory operand: the word at base + index x scale + offset (which includes pc, where that is part)."""

    base: str | None
    index: str | None
    scale: int
    offset: Value


#: A register's name, a number, memory, or something else (None).
Operand = str | Value | Memory | None


@dataclass(frozen=True)
class Step:
    """An instruction as this module needs it; ``direct`` is the vaddr that a branch names itself."""

    vaddr: int
    size: int
    word: str  # the mnemonic without prefixes and widths
    operands: tuple[Operand, ...]
    writes: tuple[str, ...]
    flow: Flow
    direct: int | None
    conditional: bool  # it may do nothing at all


@dataclass(frozen=True)
class Reference:
    """A vaddr that an instruction refers to, and whether it takes the address rather than what is there."""

    vaddr: int
    address_taken: bool


State = Mapping[str, Value]
#: Reads the word at a vaddr, None where there is none.
Word = Callable[[int], int | None]
_NOTHING: Final[State] = {}
_POPPED: Final = "return address"  # what a pop would read: the state has it after ``call next``


def references(
    steps: Sequence[Step], processor: Processor, word: Word, bits: int, thunks: Callable[[int], str | None]
) -> Iterator[Reference | None]:
    """What each of ``steps``, a function's instructions in order, refers to.

    ``thunks`` names the register in which the function at a vaddr returns its own return address (i386).
    """
    walk = _Walk(processor, word, (1 << bits) - 1, thunks)
    states = walk.states(steps) if processor.tracked else [_NOTHING] * len(steps)
    return (walk.reference(step, state) for step, state in zip(steps, states, strict=True))


@dataclass(frozen=True)
class _Walk:
    processor: Processor
    word: Word
    mask: int
    thunks: Callable[[int], str | None]

    def reference(self, step: Step, state: State) -> Reference | None:
        if step.flow != "next":
            if step.direct is not None:
                return Reference(step.direct, False)
            return self._memory(step, state) or self._register(step, state)
        if step.word not in self.processor.literals or self._literal(step) is None:
            found = self._memory(step, state)
            if found is not None:
                return found
        if step.word not in self.processor.addresses:
            return None
        result = self._computed(step, state)
        return Reference(result.number, True) if result is not None and result.anchored else None

    def _memory(self, step: Step, state: State) -> Reference | None:
        for operand in step.operands:
            if isinstance(operand, Memory):
                address = self._address(operand, state)
                if address is not None and address.anchored:
                    return Reference(address.number, step.word == "lea")
        return None

    def _register(self, step: Step, state: State) -> Reference | None:
        """An indirect jump through a register whose value is known (and, on RISC-V, an offset)."""
        offset = 0
        for operand in reversed(step.operands):
            if isinstance(operand, Value):
                offset = operand.number
            elif isinstance(operand, str):
                value = state.get(operand)
                known = value is not None and value.anchored
                return Reference((value.number + offset) & self.mask, False) if value and known else None
        return None

    # -- one instruction --------------------------------------------------------------------------

    def _address(self, memory: Memory, state: State) -> Value | None:
        number, anchored = memory.offset
        for register, scale in ((memory.base, 1), (memory.index, memory.scale)):
            if register is not None:
                value = state.get(register)
                if value is None:
                    return None
                number, anchored = number + value.number * scale, anchored or value.anchored
        return Value(number & self.mask, anchored)

    def _literal(self, step: Step) -> Value | None:
        """The constant beside the code that ``step`` loads."""
        memory = step.operands[-1] if step.operands else None
        if not isinstance(memory, Memory) or memory.base or memory.index or not memory.offset.anchored:
            return None
        number = self.word(memory.offset.number)
        return None if number is None else Value(number, False)

    def _computed(self, step: Step, state: State) -> Value | None:
        rule = self.processor.computes.get(step.word)
        if rule is None or step.conditional:
            return None
        values: list[Value | None] = []
        for operand in step.operands:
            if isinstance(operand, str):
                values.append(state.get(operand))
            elif isinstance(operand, Memory):
                literal = step.word in self.processor.literals
                read = self._literal(step) if literal else None
                values.append(self._address(operand, state) if step.word == "lea" else read)
            else:
                values.append(operand)
        result = rule(values, step.vaddr)
        return result and Value(result.number & self.mask, result.anchored)

    def _after(self, step: Step, state: State) -> State:
        """What is known after ``step``, where it leads on."""
        if step.flow == "call":
            here = Value(step.vaddr + step.size, True)
            if step.direct == here.number:
                return {**state, _POPPED: here}
            kept = {name: value for name, value in state.items() if name in self.processor.preserved}
            returned = self.thunks(step.direct) if step.direct is not None else None
            return kept if returned is None else {**kept, returned: here}
        result = self._computed(step, state)
        if step.word == "pop":
            result = state.get(_POPPED)
        first = step.operands[0] if step.operands else None
        if result is None and _POPPED not in state and not any(name in state for name in step.writes):
            return state
        kept = {name: value for name, value in state.items() if name not in step.writes and name != _POPPED}
        return kept if result is None or not isinstance(first, str) else {**kept, first: result}

    # -- all paths --------------------------------------------------------------------------------

    def states(self, steps: Sequence[Step]) -> list[State]:
        """What is known before each step."""
        targets = {step.direct for step in steps if step.flow in ("branch", "jump")}
        indirect = any(step.flow in ("branch", "jump") and step.direct is None for step in steps)
        # Code that nothing leads to is reached by a jump through a table, if there is one, or by an unwinder.
        hidden = [
            step.vaddr
            for before, step in pairwise(steps)
            if before.flow in ("jump", "stop") and step.vaddr not in targets
        ]
        incoming: dict[int, State] = {} if indirect else dict.fromkeys(hidden, _NOTHING)
        if steps:
            incoming[steps[0].vaddr] = _NOTHING
        within = {step.vaddr for step in steps}
        before: list[State | None] = [None] * len(steps)
        changed = True
        while changed:  # each pass only ever forgets
            changed = False
            state: State | None = None
            for place, step in enumerate(steps):
                state = _meet(state, incoming.get(step.vaddr))
                before[place] = state
                if state is None:
                    continue
                state = self._after(step, state)
                if step.flow in ("branch", "jump"):
                    for target in [step.direct] if step.direct is not None else hidden:
                        if target in within:
                            known = incoming.get(target)
                            merged = _meet(known, state)
                            if merged is not None and merged != known:
                                incoming[target], changed = merged, True
                if step.flow in ("jump", "stop"):
                    state = None
        return [_NOTHING if state is None else state for state in before]


def _meet(one: State | None, other: State | None) -> State | None:
    """What holds on both ways; None is a way that has not been seen."""
    if one is None or other is None or one == other:
        return other if one is None else one
    return {name: value for name, value in one.items() if other.get(name) == value}
