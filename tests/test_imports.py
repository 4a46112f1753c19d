"""Import cycles. Layers are checked by import-linter (pyproject.toml)."""

import graphlib

import grimp


def test_there_are_no_import_cycles():
    graph = grimp.build_graph("gptlab", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files
