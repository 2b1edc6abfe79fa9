"""Long videos to instruction data: segments, captions, questions, filters, and a page to review.

    video -> segments -> a caption each -> one long caption -> questions and answers -> filtered
    -> dataset.jsonl, in LLaVA's format, which `longvila train` reads

Import from the modules: `longvila.datagen.long_sft` (all of it), `longvila.datagen.segment`,
`longvila.datagen.caption`, `longvila.datagen.qa`, `longvila.datagen.journal` (what is kept),
`longvila.datagen.review`. Who is asked is `longvila.inference.caller`.
"""

from __future__ import annotations
