"""Prompts whose answer stands in them for the most part: what drafts by prompt look-up are for."""

PROMPTS = {
    "rewrite": """\
Rewrite this text with every sentence kept, but call the harbour "the port":

The old harbour of Brenta lies in a narrow bay on the northern coast. Fishing boats leave the \
harbour before sunrise and return in the afternoon with cod, herring and crab. A stone wall, built \
two hundred years ago, protects the harbour from the winter storms. On the western side of the \
harbour stands a white lighthouse, which still guides the ships at night. Every summer the people \
of the town meet at the harbour for a festival with music, food and a race of small wooden boats.\
""",
    "extract": """\
Copy from this report every sentence that has a number in it, word for word:

The survey began in spring. The team counted 214 nests along the river between the two bridges. \
Most of them belonged to herons. In the upper valley they found 38 nests of kingfishers, more than \
in any year before. The weather was mild. By the end of June, 171 of the nests along the river \
held young birds. The team thanks the farmers who let them cross their land. Next year the survey \
will cover 65 kilometres of the river and its two lakes.\
""",
    "code edit": """\
Rename the variable `total` to `amount` in this Python function and print the whole function:

```python
def invoice(items, tax_rate, discount):
    total = 0.0
    for item in items:
        price = item["price"]
        count = item["count"]
        total = total + price * count
    if discount is not None:
        total = total - discount
    if total < 0.0:
        total = 0.0
    tax = total * tax_rate
    return {"net": total, "tax": tax, "gross": total + tax}
```\
""",
}
