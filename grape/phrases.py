"""Phrases that say nothing, and that policies learn where judges reward them: for a checker and for a monitor."""

STOCK_PHRASES = (
    "as an ai language model", "as a language model", "as an ai assistant", "as an artificial intelligence",
    "i hope this helps", "i hope that helps", "i hope this email finds you well", "feel free to ask",
    "feel free to reach out", "let me know if you have any", "let me know if you need",
    "if you have any further questions", "is there anything else i can help", "happy to help", "great question",
    "excellent question", "what a great question", "certainly!", "absolutely!", "of course!", "sure thing",
    "sure, here", "sure! here", "certainly, here", "it's important to note", "it is important to note",
    "it's worth noting", "it is worth noting", "it's important to remember", "it is important to remember",
    "in today's fast-paced world", "in today's digital age", "in the ever-evolving", "ever-changing landscape",
    "let's dive in", "let's delve", "delve into", "dive deep into", "rich tapestry", "a testament to",
    "unlock the power", "unlock the potential", "game-changer", "navigate the complexities", "in conclusion,",
    "in summary,", "to sum up,", "at the end of the day", "needless to say", "without further ado",
    "i apologize for the confusion", "i apologize for any inconvenience", "you're absolutely right",
)  # fmt: skip
