"""Write the prompts of the sentiment runs: `python examples/smollm2/make_prompts.py` (always the same bytes).

Beginnings of everyday sentences that can go on well or badly, for plain continuation without a chat template.
Neutral in wording; openings that this model almost always continues with praise were left out. Each opening has
nine subjects: seven for training, the last two held out.
"""

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
HELD_OUT = 2
OPENINGS = {
    "The {} looked at my knee and": "doctor|nurse|coach|physiotherapist|teacher|trainer|surgeon|referee|lifeguard",
    "The {} in our flat": "washing machine|heater|fridge|kitchen tap|dishwasher|lift|doorbell|oven|shower",
    "The {} on Monday ended when": "meeting|lesson|rehearsal|hearing|workshop|debate|class|exam|interview",
    "The last {} of the book was": "chapter|page|line|part|third|sentence|scene|section|paragraph",
    "I changed my {} last month, and now": "diet|job|phone plan|doctor|route to work|bank|gym|bedtime|dentist",
    "The {} next door told me that his dog": "man|farmer|student|barber|pensioner|painter|cook|boy|mechanic",
    "I have used this {} for a month and": "phone|app|tent|pen|bag|camera|mattress|watch|keyboard",
    "The road to the {} was": "village|lake|farm|border|castle|harbour|station|valley|bridge",
    "It {} all weekend, so we": "rained|snowed|drizzled|was windy|was foggy|was cloudy|was hot|hailed|was cold",
    "The letter from the {} said that": "bank|council|school|hospital|tax office|university|clinic|court|embassy",
    "The morning after the {}, the street": "storm|parade|election|match|market|concert|fair|marathon|wedding",
    "The email from my {} was about": "landlord|boss|aunt|professor|lawyer|neighbour|editor|client|accountant",
    "The clerk at the {} desk told us": "front|ticket|help|luggage|check-in|visa|information|service|booking",
    "The second {} of the show is": "season|episode|half|act|series|part|run|hour|week",
    "My {} started a new job, and after a week": "cousin|brother|friend|niece|flatmate|son|nephew|sister|daughter",
    "The new rules at {} mean that": "work|school|the pool|the park|the border|the library|the gym|home|the office",
    "The {} we planted in May": "tomatoes|potatoes|roses|onions|apple trees|beans|carrots|pumpkins|sunflowers",
    "After two weeks of {}, my legs": "running|hiking|cycling|rowing|dancing|skiing|climbing|swimming|boxing",
    "The {} to Rome was": "flight|train|bus|drive|ferry|road|trip|night train|journey",
    "The film we watched {} was": "on Friday|yesterday|at school|last week|on the plane|at home|in May|on Sunday|today",
    "After reading my {}, the manager said": "report|letter|essay|proposal|notes|plan|review|draft|summary",
    "On the {} to the coast, I": "train|bus|way|road|path|ferry|trip|tram|motorway",
    "My first {} lesson was": "swimming|driving|piano|cooking|chess|Spanish|sailing|guitar|tennis",
    "The {} council decided to": "town|city|student|village|county|youth|district|parish|school",
    "People who live near the {} say": "airport|river|stadium|factory|motorway|station|forest|harbour|quarry",
    "After two years, my old {}": "laptop|car|sofa|coat|printer|bicycle|kettle|radio|backpack",
    "At the end of the {}, they": "interview|tour|course|trial|visit|season|lecture|hike|auction",
    "The {} match on Sunday ended": "football|tennis|cricket|rugby|hockey|handball|chess|basketball|volleyball",
    "My {} called last night and said": "sister|uncle|mother|dentist|grandson|tenant|partner|father|colleague",
    "The {} I bought online arrived": "shoes|chairs|curtains|headphones|glasses|books|lamp|jacket|table",
    "When my {} came home from work, he": "uncle|father|brother|neighbour|son|husband|flatmate|grandfather|cousin",
    "The {} in the yard looked at me and": "dog|goat|child|builder|postman|horse|gardener|cat|plumber",
}


def main() -> None:
    train, held_out = [], []
    for opening, subjects in OPENINGS.items():
        prompts = [opening.format(subject) for subject in subjects.split("|")]
        train += prompts[:-HELD_OUT]
        held_out += prompts[-HELD_OUT:]
    random.Random(0).shuffle(train)
    for name, prompts in (("prompts_train.jsonl", train), ("prompts_heldout.jsonl", held_out)):
        text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{len(prompts):4d} prompts  {FOLDER / name}")


if __name__ == "__main__":
    main()
