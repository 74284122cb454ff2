"""Checks that an object compiled for one instruction set exports its kernel table and nothing else.

    python check_isa_symbols.py [--nm NM] OBJECT...

Each object must define exactly one external symbol. A second one, or a weak one (an inline function, a template, a
vague-linkage variable), could be chosen by the linker for the whole program, and would then run instructions of a
newer machine on an older one. Objects of a build with sanitizers or coverage carry symbols of their own: check
those of a plain build.
"""

import argparse
import subprocess
import sys

# nm's letters: W, V weak objects and functions, u unique globals; I and i are indirect functions. Upper case is
# external; N and - are debugging symbols.
WEAK = set("WwVvuIi")
IGNORED = set("N-?")


def defined_symbols(path, nm):
    """Give (letter, name) of every symbol the object defines, names as a C++ programmer writes them."""
    listing = subprocess.run(
        [nm, "--defined-only", "--demangle", "--format=bsd", path], check=True, capture_output=True, text=True
    )
    for line in listing.stdout.splitlines():
        _, letter, name = line.split(maxsplit=2)
        yield letter, name


def problems(path, nm):
    """Tell what is wrong with one object, in sentences."""
    symbols = [(letter, name) for letter, name in defined_symbols(path, nm) if letter not in IGNORED]
    for letter, name in symbols:
        if letter in WEAK:
            yield f"{path}: must define no weak symbol, got {letter} {name}"
    exported = [name for letter, name in symbols if letter.isupper() and letter not in WEAK]
    if len(exported) != 1:
        yield f"{path}: must export exactly one symbol, got {len(exported)}: {', '.join(exported) or 'none'}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nm", default="nm", help="the nm of the toolchain, for cross builds")
    parser.add_argument("objects", nargs="+")
    arguments = parser.parse_args()
    found = [problem for path in arguments.objects for problem in problems(path, arguments.nm)]
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
