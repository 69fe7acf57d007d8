"""The copied public form as a contender by path: it is defined in `fullattn.bench`.

    fullattn bench --contender benchmarks/copied_public_form.py:CopiedPublicForm

It ships inside the package, so that `fullattn bench` has its baseline wherever it is installed.
This file is the example of what `--contender` takes: a class called with the number of channels.
"""

from fullattn.bench.copied_public_form import CopiedPublicForm

__all__ = ["CopiedPublicForm"]
