"""Passes over the captured graph: normalize, detect, analyze, rewrite."""

if __name__ != "attnc.passes":
    raise ImportError("import attnc.passes, not the folder: see CONTRIBUTING.md")
