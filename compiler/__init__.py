"""attnc: find attention in any PyTorch model and rewrite it into checked, faster forms."""

if __name__ != "attnc":
    raise ImportError("import attnc, not the folder: see CONTRIBUTING.md")
