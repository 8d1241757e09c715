"""What the scripts of this folder are made of, a folder a subject. Run a script, and `parts` is beside it on the path;
the tests have the same path from pyproject.toml.

    record       rows of a record, read and written; where they come from
    tables       Markdown
    shapes       of a known model, and a toy's
    small_llama  a Llama of a million parameters on Shakespeare, that several subjects train
    peers        optimizers of other packages
    tracked      bytes at a peak, out of torch's tracker
"""
