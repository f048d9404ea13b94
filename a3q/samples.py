"""Fixed texts that several stages use."""

TOKENIZER_SAMPLE = (
    "It's what they'LL say: we'Re sure, I'M not, he'd, SHE'D, don't, DON'T, you've 'tis 'S.\n"
    "Numbers 7 42 365 2048 31415 1000000 3.14159 1,234,567 ½ ² Ⅻ ١٢٣ 四十二 0x1F 1e-9\n"
    "\tif (x<10) {\n\t\treturn  y[i] += 'a';   // two  spaces, then three\n\t}\n\n\n    def f(self, *args): pass\r\n"
    "\r\n  \r\n mixed\t \t indent \u00a0no\u00a0break\u2003em\u3000wide\r\n"
    "海边的小镇下着雨，我们慢慢走回家。雨の夜、窓のそばでカフェオレを飲む。바닷가 작은 마을에 비가 내린다.\n"
    "في القرية الصغيرة نهرٌ وجسرٌ قديم. בכפר יש גשר ישן. छोटे गाँव में एक पुराना पुल है। หมู่บ้านเล็กริมน้ำ ছোট গ্রাম\n"
    "Старый мост, παλιά γέφυρα, łódź, über Größe, naïve café, Tiếng Việt, ǅ ﬁ ẞ İstanbul, camelCaseWORDSnake_case\n"
    # Marks without a precomposed form, so that the text is in NFC: llama.cpp has no normalizers.
    "marks: x\u0302 q\u0303 m\u0331\u0306 \u0301 z\u0358\n"
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇪🇺 ❤️ 🫠 ☃ 𝒳 𐍈 𠮷\n"
    "looks like control: <|im_start|>user <|im_end|> <|endoftext|><s>[INST] </s> <unk> <0x0A> <|eot_id|> <pad>\n"
    "punctuation ... !!! ?! -- --- == != <= => |> #$%^&*()_+~` “quoted” «so» ‘’ — … · § € ¥ ™\n"
    "zero\u200bwidth \u200d joiner \ufeff mark \u0085 next \u2028 line; underscore ▁ Ġ Ċ blocks\n"
    "ends in spaces   "
)
"""Text that tokenizers disagree on most easily: many scripts, digits, case, white space, marks, control look-alikes."""
