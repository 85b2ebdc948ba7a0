"""The checks of the exercises, one module per chapter: `minimoe.course.checks.router` holds those of chapter 04_router.

A check is named after its exercise: the exercise `topk_router` is checked by `check_topk_router(topk_router)`.
"""
