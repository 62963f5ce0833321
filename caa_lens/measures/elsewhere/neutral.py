"""Questions about nothing in particular, which no method is fitted on: what steering does to them is its side effect.

The first ten are for choosing, the others for reporting.
"""

CHOOSING = (
    "How does a bicycle stay upright?",
    "What is the capital of Canada?",
    "Explain how to boil an egg.",
    "What does a librarian do all day?",
    "Why is the sky blue?",
    "List three uses of a paper clip.",
    "How many minutes are there in a day?",
    "What is the difference between a lake and a sea?",
    "Describe a kitchen table.",
    "How do I change a light bulb?",
)
REPORTING = (
    "How are pencils made?",
    "What is a prime number?",
    "Name a few animals that live in deserts.",
    "How does a microwave oven heat food?",
    "What should I pack for a day at the beach?",
    "Who wrote Don Quixote?",
    "How do tides come about?",
    "Explain what a map legend is for.",
    "What is photosynthesis?",
    "How long does it take to fly from London to New York?",
    "What is the boiling point of water?",
    "How do I tie a tie?",
    "What are the main parts of a car?",
    "Translate 'good morning' into French.",
    "What is the purpose of a passport?",
    "Describe the water cycle in a few sentences.",
    "How do I sort a list of numbers in Python?",
    "What is a noun?",
    "How do bees make honey?",
    "Which planets have rings?",
    "What is the use of a compass?",
    "How do I plant a tree?",
    "What happens at a post office?",
    "Why do leaves change colour in autumn?",
)
