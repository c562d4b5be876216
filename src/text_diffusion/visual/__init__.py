"""Pages and pictures of training runs.

`folder` reads what is there of a run, `findings` asks its model, `recording` keeps sentences in the making; `charts`
draws, `page` writes the HTML; `pictures` (PNG, GIF) and `terminal` need the extra `viz`.
"""
