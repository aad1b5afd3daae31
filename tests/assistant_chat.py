"""A chat of half a year between one user and an assistant, and questions about it: what tests of search are asked.

Of our own making. Answers are long, with lists and code, as assistants' are; what matters is often said in passing.
"""

from datetime import UTC, datetime, timedelta

START = datetime(2026, 1, 5, 9, tzinfo=UTC)

# Day since the start, what the user says, what the assistant answers.
TURNS = [
    (0, "Hi! I'm new here. Can you help me plan my weeks?", "Hello! Happy to. Tell me about your work, your family and your plans, and I will keep them in mind when you ask for suggestions."),
    (0, "I work three days a week as a nurse at Saint Martin's, mostly night shifts.", "Thanks, that helps. With night shifts it is worth keeping two quiet mornings after each block. I would suggest:\n\n1. A fixed bedtime after the last shift.\n2. No appointments before noon on the day after.\n3. Groceries delivered on the first free day.\n\nShall I draft a calendar along these lines?"),
    (1, "From now on, please always answer in short bullet points. I read this on my phone between patients.", "- Understood\n- Short bullets from now on"),
    (3, "My sister Ines is coming to stay in March with her two boys. They're vegetarian and the little one can't have nuts.", "- Noted: Ines and two boys in March\n- Vegetarian meals\n- No nuts at all for the little one: check pesto, granola, curry pastes and many chocolates\n- I can prepare a menu for the week if you tell me how long they stay"),
    (6, "What laptop should I get for my studies? I don't want to spend more than 900 euros and it has to be light.", "- Aim for 1.2 kg or less and 16 GB of memory\n- Three that fit: the Lumo Air 13 (849 euros, 1.1 kg), the Teno Book S (899 euros, 1.15 kg, best keyboard) and the Arvo 14 (799 euros, 1.3 kg, best battery)\n- For writing papers I would take the Teno Book S: the keyboard matters most, and it is quiet\n- Buy it with the student discount, which usually takes off 8 percent"),
    (7, "I took the one with the good keyboard. It arrives on Thursday.", "- Good choice\n- Charge it fully once before the first update\n- Turn on disk encryption in the settings, since it will hold notes about your studies"),
    (9, "Can you write a Python function that adds up my night shift hours from a list of start and end times?", "- Here it is:\n\n```python\ndef night_hours(shifts):\n    total = timedelta()\n    for start, end in shifts:\n        if end < start:\n            end += timedelta(days=1)\n        total += end - start\n    return total.total_seconds() / 3600\n```\n\n- Times that end after midnight are moved to the next day\n- Pass datetimes, or times of one date"),
    (12, "It's off by one hour at the end of March. Why?", '- Because of daylight saving: in that night an hour is missing\n- Use zone-aware datetimes with `zoneinfo.ZoneInfo("Europe/Lisbon")`, subtract them in UTC, and the sum is right again'),
    (15, "Give me ideas for a gift for my colleague Tomas who is leaving the ward. He likes birds and long walks.", "- A pair of small binoculars, 8x25, about 70 euros\n- A field guide to the birds of the Atlantic coast\n- A day ticket for two to the lagoon reserve\n- A good flask for walks\n- My favourite of these: the field guide with everybody's signatures inside"),
    (18, "We all signed the book for him, he was moved to tears.", "- Lovely\n- A photo of the page would make a nice card for the ward"),
    (20, "My rent goes up to 780 from February. Can you work out what I have left? I earn 1650 after tax.", "- 1650 - 780 = 870 euros after the rent\n- With 240 for food, 60 for transport and 45 for phone and internet: 525 left\n- I would put 150 of these aside each month"),
    (24, "I prefer trains over planes whenever it takes less than eight hours.", "- Noted: trains first when under eight hours"),
    (26, "How do I get from Lisbon to Madrid then?", "- There is no direct train at the moment: via Entroncamento and Badajoz it takes about nine hours\n- The night bus takes eight\n- A flight takes an hour and twenty minutes, plus the airports\n- By your own rule this one would be a flight"),
    (30, "Explain the difference between type 1 and type 2 diabetes in a way that I can use with a patient.", "- Type 1: the body makes hardly any insulin, because its own defence has destroyed the cells that do. It often begins in childhood. Insulin is always needed\n- Type 2: the body makes insulin but answers to it less and less. It begins slowly, often with age and weight. Food, movement and tablets help, insulin sometimes later\n- A picture that patients like: type 1 has lost the key, type 2 has a rusty lock"),
    (33, "She loved the key and lock thing, thank you.", "- Glad to hear it"),
    (37, "My address for deliveries is Rua das Flores 12, second floor.", "- Saved: Rua das Flores 12, second floor"),
    (41, "What should I cook for six people on Saturday? Two of them are children.", "- Starter: carrot soup with orange\n- Main: a tray of roasted vegetables with halloumi and couscous\n- Dessert: baked apples with oats\n- All of it vegetarian, and without nuts, should Ines and the boys be there\n- Shopping: 1.5 kg carrots, 3 peppers, 2 aubergines, 400 g halloumi, 500 g couscous, 6 apples"),
    (45, "I started running again. Two kilometres without stopping!", "- Great start\n- Keep it easy: you should be able to talk\n- Three times a week, and 10 percent more each week at most"),
    (50, "Make me a plan to reach 10 km by the summer, please.", "- Weeks 1 to 4: 2, 2.5, 3, 3.5 km, three times a week\n- Weeks 5 to 8: 4, 4.5, 5, 5.5 km, one of the runs slower\n- Weeks 9 to 12: 6, 7, 7.5, 8 km\n- Weeks 13 to 16: 8.5, 9, 9.5, 10 km\n- No run on the day after a night shift"),
    (54, "The dog of the neighbours bit me in the hand today, nothing bad.", "- Rinse it for ten minutes and see a doctor today: bites of the hand infect easily\n- Check your tetanus shot: it should be less than five years old for a bite\n- Ask the neighbours for the dog's papers"),
    (55, "The shot was from 2019, so I got a new one.", "- Right\n- Next one in ten years, so 2036"),
    (60, "I got the place in the master's programme! It starts on the 14th of September.", "- Congratulations!\n- Things to do: the enrolment by the end of June, a talk with the ward about fewer nights, the student card"),
    (64, "My thesis should be about handovers between shifts. Can you suggest a structure?", "- 1 Introduction: why handovers go wrong\n- 2 What is known: models such as ISBAR, and how well they work\n- 3 Question and method: observation of thirty handovers on two wards, then interviews\n- 4 Results\n- 5 What follows for training\n- Start with chapter 3, since the ethics board needs it first"),
    (70, "I'm moving at the end of the month. The new address is Travessa do Sol 4, ground floor.", "- Saved: from the end of the month Travessa do Sol 4, ground floor\n- Tell the bank, the hospital, the insurance and the post office"),
    (75, "Ines told me that the boy's allergy test is clear: he may have nuts now.", "- Good news\n- I will no longer leave them out"),
    (80, "Which of the three topics should I present at the ward meeting: hand hygiene, falls, or pain scales?", "- Falls: you have numbers of your own from last year, and something changed\n- Hand hygiene was presented in autumn\n- Pain scales need more time than fifteen minutes"),
    (84, "The meeting went well, they want me to do it every quarter.", "- Congratulations\n- Next one would be in late June: I suggest pain scales, with thirty minutes"),
    (90, "Never call me by my full name, Maria da Conceição. Everyone says São.", "- Of course, São"),
    (96, "My phone number changed, it's 912 555 018 now.", "- Noted: 912 555 018"),
    (101, "Recommend me a book for the train, nothing about hospitals please!", "- The Salt Path by Raynor Winn: a walk along a coast, and starting again\n- A Gentleman in Moscow by Amor Towles: funny and warm, long enough for two journeys\n- The Summer Book by Tove Jansson: short, an island, a grandmother\n- I would take The Summer Book for a trip to the sea"),
    (107, "I finished the one with the grandmother, it was wonderful.", "- Then try Fair Play by the same author"),
    (112, "How long do I boil eggs so that the yolk stays soft?", "- Six and a half minutes from boiling water, medium size, from the fridge\n- Then cold water for a minute"),
    (118, "The shop sent the wrong curtains, blue instead of green. Write them a polite mail?", "- Subject: Wrong colour, order 40781\n- Dear team, I ordered the green linen curtains and received blue ones. Please send the green pair and a label for the return. Thank you and kind regards, São"),
    (125, "I've decided to stop eating meat as well, like Ines.", "- Noted: vegetarian for you too\n- Think of B12, and of iron, since you give blood"),
    (131, "Remind me what exercises the physio gave me? Shoulder blades together ten times, band pulls fifteen times, and the wall slide.", "- Shoulder blades together: 10 times\n- Band pulls: 15 times\n- Wall slides: no number given, I suggest 10\n- Twice a day until it no longer hurts"),
    (138, "I ran ten kilometres today, in 68 minutes!", "- Four weeks ahead of the plan: congratulations!\n- Rest tomorrow"),
    (144, "My tutor is Professor Almeida, and her office hours are Tuesdays at four.", "- Noted: Professor Almeida, Tuesdays at 16:00"),
    (150, "The landlord wants to keep 200 euros of the deposit because of a scratch in the floor. Is that right?", "- Only if it is more than normal wear\n- Ask for the handover protocol and for the invoice\n- If the floor was older than ten years, little of its value is left to be paid\n- A letter with a date by which you want an answer often helps"),
    (156, "He paid it all back after the letter.", "- Well done"),
    (163, "I'd like to learn the guitar. How much should I spend on a first one?", "- 150 to 250 euros buy a decent one that stays in tune\n- Nylon strings are kinder to the fingers\n- Have it set up in the shop: about 30 euros, and worth more than a dearer guitar"),
]  # fmt: skip

# A question, and what the first hits must hold of: (question, how many hits, texts that must be among them).
QUESTIONS = [
    # facts about the user, said in passing
    ("Where do I work?", 3, ["I work three days a week as a nurse"]),
    ("What do I earn after tax?", 3, ["My rent goes up to 780"]),
    ("When was my last tetanus shot before this one?", 3, ["The shot was from 2019"]),
    ("Who is my tutor and when can I see her?", 3, ["My tutor is Professor Almeida"]),
    ("When does my master's programme begin?", 3, ["I got the place in the master's programme"]),
    ("How fast did I run ten kilometres?", 3, ["I ran ten kilometres today"]),
    ("What is my telephone number?", 3, ["My phone number changed"]),
    # standing instructions and preferences
    ("How should answers be formatted?", 5, ["please always answer in short bullet points"]),
    ("Do I like to fly or to take the train?", 3, ["I prefer trains over planes"]),
    ("What does the user want to be called?", 3, ["Never call me by my full name"]),
    ("What food do I not eat?", 5, ["I've decided to stop eating meat"]),
    # updates: what was said before and what holds now, both found
    ("What is my address?", 5, ["The new address is Travessa do Sol 4", "My address for deliveries is Rua das Flores 12"]),
    ("Can my nephew eat nuts?", 5, ["allergy test is clear", "the little one can't have nuts"]),
    # what the assistant said
    ("Which laptops did you recommend?", 3, ["the Lumo Air 13 (849 euros"]),
    ("What did you suggest to cook for six people?", 3, ["carrot soup with orange"]),
    ("Which books did you recommend for the train?", 3, ["A Gentleman in Moscow"]),
    ("What structure did you propose for my thesis?", 3, ["observation of thirty handovers"]),
    ("What did you tell me about the deposit?", 3, ["Ask for the handover protocol"]),
    ("How much did you say a first guitar costs?", 3, ["150 to 250 euros"]),
    ("What picture did you give me for explaining diabetes?", 3, ["type 2 has a rusty lock"]),
    # lists and code
    ("What was the third exercise from the physio?", 3, ["and the wall slide"]),
    ("How far should I run in week 7 of the plan?", 3, ["Weeks 5 to 8"]),
    ("What was the function night_hours?", 3, ["def night_hours"]),
    ("Why were the hours wrong when the clocks changed?", 3, ["Because of daylight saving"]),
    ("How many carrots do I need for the soup?", 3, ["1.5 kg carrots"]),
    ("What was the number of the curtain order?", 3, ["order 40781"]),
    # short answers whose topic is some turns back
    ("Which laptop did I buy?", 5, ["I took the one with the good keyboard"]),
    ("How did Tomas like his present?", 5, ["he was moved to tears"]),
    ("Did I get the deposit back?", 5, ["He paid it all back"]),
    ("Which of the books have I read?", 8, ["I finished the one with the grandmother"]),
    # times
    ("What did I achieve in May?", 3, ["I ran ten kilometres today"]),
    ("What happened with the dog in February?", 3, ["The dog of the neighbours bit me"]),
]  # fmt: skip


def when(day: int) -> datetime:
    """The moment of a turn."""
    return START + timedelta(days=day)
