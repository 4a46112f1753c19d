"""What imports what; the layers are import-linter's (pyproject.toml)."""

import graphlib

import grimp


def test_no_files_import_each_other_in_a_cycle():
    graph = grimp.build_graph("gptlab", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the files
