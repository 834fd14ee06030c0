import emlens

project = "emlens"
author = "The emlens authors"
copyright = "2026, the emlens authors"
release = version = emlens.__version__

extensions = ["myst_parser", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = "$ "
html_theme = "furo"
html_title = f"emlens {release}"
