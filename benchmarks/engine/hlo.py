"""What the text of a compiled module says of it."""

import math
import re
from typing import NamedTuple

COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}
PRODUCTS = r'(dot|convolution)\(|custom-call\(.*custom_call_target="__cu(blas|dnn)'
INSTRUCTION = re.compile(r" +(?:ROOT )?%([\w.-]+) = (.*?) (([\w-]+)\((.*))")
# Operations that only name what is there.
NAMING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
NAMING |= {"partition-id", "replica-id"}


class Collective(NamedTuple):
    kind: str
    bytes: int  # of its results
    awaited: bool  # whether a matrix product or a convolution depends on it


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled module, from its text, where whatever is used stands before its use."""
    found: list[Collective] = []
    awaited: set[int] = set()
    depends: dict[str, set[int]] = {}  # on which collectives an instruction does
    held: dict[str, set[int]] = {}  # the collectives of a computation
    multiplying: set[str] = set()  # the computations with a product
    computation = ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%([\w.-]+) \(.*\{$", line):
            computation = head[1]
            held[computation] = set()
        elif parsed := INSTRUCTION.match(line):
            name, shape, operation, opcode, rest = parsed.groups()
            operands, _, attributes = rest.partition("), ")
            called = held.keys() & set(re.findall(r"%([\w.-]+)", attributes))
            before = set().union(*(depends.get(o, ()) for o in re.findall(r"%([\w.-]+)", operands)))
            if re.match(PRODUCTS, operation) or called & multiplying:
                awaited |= before
                multiplying.add(computation)
            here = set().union(*(held[c] for c in called))
            if (kind := opcode.removesuffix("-start")) in COLLECTIVES:
                here.add(len(found))
                found.append(Collective(kind, size(shape), False))
            held[computation] |= here
            depends[name] = before | here
    return [c._replace(awaited=i in awaited) for i, c in enumerate(found)]


def launches(hlo: str) -> int:
    """Operations of a compiled module's entry, each of which does something."""
    entry = hlo.partition("\nENTRY ")[2].partition("\n}")[0]
    opcodes = [parsed[4] for line in entry.splitlines() if (parsed := INSTRUCTION.match(line))]
    return sum(not (opcode in NAMING or opcode.endswith("-done")) for opcode in opcodes)


def size(shape: str) -> int:
    """Bytes of an HLO shape, a tuple or an array: ``(f32[8,4]{1,0:T(8,128)}, s32[])`` has 132."""
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    return sum(
        (int(bits or 8) + 7) // 8 * math.prod(int(n) for n in dims.split(",") if n)
        for _, bits, dims in arrays
    )
