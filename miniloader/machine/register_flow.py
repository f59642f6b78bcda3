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

__all__ = ["Effect", "Flow", "MemoryOperand", "Operand", "Reference", "references"]

Flow = Literal["next", "call", "branch", "jump", "stop"]
"""Where an instruction leads: to the next; there and back; there or to the next; there; nowhere."""


@dataclass(frozen=True)
class MemoryOperand:
    """A memory operand: the word at base + index x scale + offset (which includes pc, where that is part)."""

    base: str | None
    index: str | None
    scale: int
    offset: Value


#: A register's name, a number, memory, or something else (None).
Operand = str | Value | MemoryOperand | None


@dataclass(frozen=True)
class Effect:
    """What an instruction does, as far as that matters here; ``direct`` is the vaddr that a branch names."""

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
    effects: Sequence[Effect],
    processor: Processor,
    word: Word,
    bits: int,
    thunks: Callable[[int], str | None],
) -> Iterator[Reference | None]:
    """What each of ``effects``, a function's instructions in order, refers to.

    ``thunks`` names the register in which the function at a vaddr returns its own return address (i386).
    """
    walk = _Walk(processor, word, (1 << bits) - 1, thunks)
    states = walk.states(effects) if processor.tracked else [_NOTHING] * len(effects)
    return (walk.reference(effect, state) for effect, state in zip(effects, states, strict=True))


@dataclass(frozen=True)
class _Walk:
    processor: Processor
    word: Word
    mask: int
    thunks: Callable[[int], str | None]

    def reference(self, effect: Effect, state: State) -> Reference | None:
        if effect.flow != "next":
            if effect.direct is not None:
                return Reference(effect.direct, False)
            return self._memory(effect, state) or self._register(effect, state)
        if effect.word not in self.processor.literals or self._literal(effect) is None:
            reference = self._memory(effect, state)
            if reference is not None:
                return reference
        if effect.word not in self.processor.addresses:
            return None
        result = self._computed(effect, state)
        return Reference(result.number, True) if result is not None and result.anchored else None

    def _memory(self, effect: Effect, state: State) -> Reference | None:
        for operand in effect.operands:
            if isinstance(operand, MemoryOperand):
                address = self._address(operand, state)
                if address is not None and address.anchored:
                    return Reference(address.number, effect.word == "lea")
        return None

    def _register(self, effect: Effect, state: State) -> Reference | None:
        """An indirect jump through a register whose value is known (and, on RISC-V, an offset)."""
        offset = 0
        for operand in reversed(effect.operands):
            if isinstance(operand, Value):
                offset = operand.number
            elif isinstance(operand, str):
                value = state.get(operand)
                if value is None or not value.anchored:
                    return None
                return Reference((value.number + offset) & self.mask, False)
        return None

    # -- one instruction --------------------------------------------------------------------------

    def _address(self, memory: MemoryOperand, state: State) -> Value | None:
        number, anchored = memory.offset
        for register, scale in ((memory.base, 1), (memory.index, memory.scale)):
            if register is not None:
                value = state.get(register)
                if value is None:
                    return None
                number, anchored = number + value.number * scale, anchored or value.anchored
        return Value(number & self.mask, anchored)

    def _literal(self, effect: Effect) -> Value | None:
        """The constant beside the code that ``effect`` loads."""
        memory = effect.operands[-1] if effect.operands else None
        if not isinstance(memory, MemoryOperand) or memory.base or memory.index or not memory.offset.anchored:
            return None
        number = self.word(memory.offset.number)
        return None if number is None else Value(number, False)

    def _computed(self, effect: Effect, state: State) -> Value | None:
        rule = self.processor.computes.get(effect.word)
        if rule is None or effect.conditional:
            return None
        values: list[Value | None] = []
        for operand in effect.operands:
            if isinstance(operand, str):
                values.append(state.get(operand))
            elif isinstance(operand, MemoryOperand):
                literal = effect.word in self.processor.literals
                read = self._literal(effect) if literal else None
                values.append(self._address(operand, state) if effect.word == "lea" else read)
            else:
                values.append(operand)
        result = rule(values, effect.vaddr)
        return result and Value(result.number & self.mask, result.anchored)

    def _after(self, effect: Effect, state: State) -> State:
        """What is known after ``effect``, where it leads on."""
        if effect.flow == "call":
            following = Value(effect.vaddr + effect.size, True)
            if effect.direct == following.number:
                return {**state, _POPPED: following}
            kept = {name: value for name, value in state.items() if name in self.processor.preserved}
            returned = self.thunks(effect.direct) if effect.direct is not None else None
            return kept if returned is None else {**kept, returned: following}
        result = self._computed(effect, state)
        if effect.word == "pop":
            result = state.get(_POPPED)
        first = effect.operands[0] if effect.operands else None
        if result is None and _POPPED not in state and not any(name in state for name in effect.writes):
            return state
        kept = {name: value for name, value in state.items() if name not in effect.writes and name != _POPPED}
        return kept if result is None or not isinstance(first, str) else {**kept, first: result}

    # -- all paths --------------------------------------------------------------------------------

    def states(self, effects: Sequence[Effect]) -> list[State]:
        """What is known before each instruction of ``effects``."""
        targets = {effect.direct for effect in effects if effect.flow in ("branch", "jump")}
        indirect = any(effect.flow in ("branch", "jump") and effect.direct is None for effect in effects)
        # Code that nothing leads to is reached by a jump through a table, if there is one, or by an unwinder.
        hidden = [
            effect.vaddr
            for previous, effect in pairwise(effects)
            if previous.flow in ("jump", "stop") and effect.vaddr not in targets
        ]
        incoming: dict[int, State] = {} if indirect else dict.fromkeys(hidden, _NOTHING)
        if effects:
            incoming[effects[0].vaddr] = _NOTHING
        within = {effect.vaddr for effect in effects}
        states: list[State | None] = [None] * len(effects)
        changed = True
        while changed:  # each pass only ever forgets
            changed = False
            state: State | None = None
            for place, effect in enumerate(effects):
                state = _meet(state, incoming.get(effect.vaddr))
                states[place] = state
                if state is None:
                    continue
                state = self._after(effect, state)
                if effect.flow in ("branch", "jump"):
                    for target in [effect.direct] if effect.direct is not None else hidden:
                        if target in within:
                            earlier = incoming.get(target)
                            merged = _meet(earlier, state)
                            if merged is not None and merged != earlier:
                                incoming[target], changed = merged, True
                if effect.flow in ("jump", "stop"):
                    state = None
        return [_NOTHING if state is None else state for state in states]


def _meet(first: State | None, second: State | None) -> State | None:
    """What holds on both ways; None is a way that has not been seen."""
    if first is None or second is None or first == second:
        return second if first is None else first
    return {name: value for name, value in first.items() if second.get(name) == value}
