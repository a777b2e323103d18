"""One description for each published network: its file formats, its sizes, the names of its weights."""
