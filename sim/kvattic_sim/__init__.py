"""Simulation of kvattic: oracle, NAND parts and models, building and running, reports."""

from kvattic.support.renamed import keep_old_names

keep_old_names("kvattic_sim", {
    "bench": "reports.bench",
    "benches": "reports.benches",
    "documents": "reports.documents",
    "main": "reports.drive",
    "nand_files": "nand.files",
    "nand_twin": "nand.twin",
    "sweep": "reports.sweep",
})
