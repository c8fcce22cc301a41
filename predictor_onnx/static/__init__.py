"""Reading submitted code without running it.

``analysis.analyse`` starts here. ``source`` parses the files; ``evaluator`` walks the program from its
entrypoint as Python would, one abstract value at a time (``values``): a number is a number, a tensor is a shape
and a type without contents, and whatever cannot be known is ``UNKNOWN``. ``expressions`` and ``statements`` hold
the language, ``python_builtins`` its builtin functions, ``library`` the calls into torch, timm, transformers and
their like, ``command_line`` argparse, typer and click. A network is built of ``layers`` and ``named_models``; when
it is called, ``ops`` compute shapes and tell the ``recorder`` what is allocated and what autograd keeps. A
training loop is walked once, because every turn needs the same memory. ``files`` reads the bundle's configurations.
Call depth, loops and the size of every value are bounded and all work is paid from one ``budget`` of steps and time,
so no program can make the reading long or large.
"""
