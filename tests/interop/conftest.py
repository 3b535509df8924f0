"""Programs that made the files of other libraries need these libraries."""

collect_ignore = ["files"]
