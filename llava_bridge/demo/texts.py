"""What is said in each language: wordings of every question, places, directions, categories, small talk.

The first wording of a question is the one that evaluation uses. English has articles and plurals; the other languages
put names in quotation marks, so that no genders are needed. Numbers are digits everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm2clip.demo.concepts import Concept, bare
from llm2clip.demo.wording import Cell, capitalise, definite, plural, takes_article, verb, with_article

Wordings = tuple[str, ...]
NUM_WORDINGS = 12
"""Wordings are counted round: a multiple of how many any question has."""


@dataclass(frozen=True)
class Language:
    """How one language asks and answers."""

    tag: str
    yes: str
    no: str
    quotes: str
    """Format of a name inside a sentence; unused in English."""
    rows: tuple[str, str, str]
    columns: tuple[str, str, str]
    places: Mapping[str, Wordings]
    """Wordings for `center`, `edge` (top or bottom centre), `side` (centre left or right) and `corner`."""
    sides: Mapping[str, str]
    questions: Mapping[str, Wordings]
    """Wordings by subtype of question."""
    small_talk: tuple[tuple[str, str], ...]

    def question(self, subtype: str, wording: int, grid: int, **slots: Any) -> str:
        """Write a question.

        Args:
            subtype: key of `questions`.
            wording: which of the wordings, counted round.
            grid: cells per side of a scene.
            **slots: any of `thing` and `other` (concepts), `category`, `number`, `cell`, `side`.
        """
        wordings = self.questions[subtype]
        words: dict[str, Any] = {}
        for name, value in slots.items():
            if name == "cell":
                words["place"] = self.place(value, grid, wording // len(wordings))
            elif name == "side":
                words["side"] = self.sides[value]
            elif name == "category":
                words["kind"] = with_article(value) if self.tag == "en" else self.quotes.format(self.category(value))
            elif name == "thing":
                words |= self._mentions(value)
            elif name == "other":
                words["the_other"] = self._mentions(value)["the"]
            else:
                words[name] = value
        return capitalise(wordings[wording % len(wordings)].format(**words))

    def answer(self, value: Concept | bool | int | str) -> str:
        """The short answer: a concept's name, yes or no, digits, or a category."""
        if isinstance(value, Concept):
            return self.name(value)
        if isinstance(value, bool):
            return self.yes if value else self.no
        return str(value) if isinstance(value, int) else self.category(value)

    def name(self, concept: Concept) -> str:
        return bare(concept.name) if self.tag == "en" else concept.translations[self.tag]

    def category(self, category: str) -> str:
        return category if self.tag == "en" else CATEGORIES[category][OTHER_LANGUAGES.index(self.tag)]

    def place(self, cell: Cell, grid: int, wording: int = 0) -> str:
        """Where a cell is: `in the top left corner`."""
        row, column = (index if grid == 3 else 2 * index for index in cell)
        kind = {(True, True): "center", (False, True): "edge", (True, False): "side"}.get((row == 1, column == 1))
        wordings = self.places[kind or "corner"]
        return wordings[wording % len(wordings)].format(row=self.rows[row], column=self.columns[column])

    def _mentions(self, concept: Concept) -> dict[str, str]:
        """The forms in which a question may mention a thing."""
        if self.tag != "en":
            quoted = self.quotes.format(self.name(concept))
            return {"a": quoted, "the": quoted, "many": quoted}
        name = concept.name
        many = plural(name) if takes_article(name) else bare(name)
        return {"a": with_article(name), "the": definite(name), "many": many, "be": verb(name, "is", "are")}


ENGLISH = Language(
    tag="en", yes="yes", no="no", quotes="{}",
    rows=("top", "middle", "bottom"), columns=("left", "center", "right"),
    places={
        "center": ("in the center", "in the middle"),
        "edge": ("at the {row} center", "in the middle of the {row} row"),
        "side": ("at the center {column}", "in the middle row on the {column}"),
        "corner": ("in the {row} {column} corner", "at the {row} {column}"),
    },
    sides={"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"},
    questions={
        "total": ("How many things are in the picture?", "How many objects do you see?",
                  "Count the things in the picture.", "How many drawings are there?"),
        "object": ("How many {many} are in the picture?", "How many {many} do you see?", "Count the {many}.",
                   "What is the number of {many} in this image?"),
        "exists": ("{be} there {a} in the picture?", "Can you see {a}?", "Does the picture show {a}?",
                   "{be} {a} shown here?"),
        "exists_category": ("Is there {kind} in the picture?", "Can you see {kind}?", "Does the picture show {kind}?",
                            "Is {kind} shown here?"),
        "exists_number": ("Are there {number} things in the picture?", "Do you see {number} objects?",
                          "Does the picture show {number} drawings?"),
        "exists_more": ("Are there more than {number} things in the picture?",
                        "Do you see more than {number} objects?",
                        "Does the picture show more than {number} drawings?"),
        "exists_place": ("Is there anything {place}?", "Do you see anything {place}?"),
        "category": ("What kind of thing is {place}?", "What sort of thing do you see {place}?",
                     "What category does the thing {place} belong to?"),
        "name": ("What is {place}?", "What do you see {place}?", "Name the thing {place}.", "Which thing is {place}?"),
        "what_side": ("What is {side} {the}?", "Which thing is {side} {the}?", "Name what you see {side} {the}."),
        "is_side": ("{be} {the} {side} {the_other}?", "Would you say that {the} {be} {side} {the_other}?",
                    "Can {the} be seen {side} {the_other}?"),
        "word_category": ("What kind of thing {be} {a}?", "In one or two words, what {be} {a}?"),
        "word_other": ('What is another way to say "{name}"?', 'Give another name for "{name}".'),
        "word_to": ('What is "{name}" in {language}?', 'Translate "{name}" into {language}.',
                    'How do you say "{name}" in {language}?'),
    },
    small_talk=(
        ("Hello!", "Hello! What would you like to know?"),
        ("Hi, can you help me?", "Of course. What is your question?"),
        ("Good morning.", "Good morning! How can I help?"),
        ("What can you do?", "I answer questions about pictures and words."),
        ("Thank you!", "You are welcome."),
    ),
)  # fmt: skip
GERMAN = Language(
    tag="de", yes="ja", no="nein", quotes="„{}“",
    rows=("oben", "in der mittleren Reihe", "unten"), columns=("links", "in der Mitte", "rechts"),
    places={"center": ("in der Mitte",), "edge": ("{row} in der Mitte",), "side": ("{row} {column}",),
            "corner": ("{row} {column}", "in der Ecke {row} {column}")},
    sides={"left": "links von", "right": "rechts von", "above": "über", "below": "unter"},
    questions={
        "total": ("Wie viele Dinge sind auf dem Bild?", "Wie viele Dinge siehst du?", "Zähle die Dinge im Bild."),
        "object": ("Wie oft ist {many} auf dem Bild?", "Wie oft siehst du {many}?", "Zähle, wie oft {many} vorkommt."),
        "exists": ("Ist {a} auf dem Bild?", "Siehst du {a}?", "Zeigt das Bild {a}?"),
        "exists_category": ("Ist etwas der Art {kind} auf dem Bild?", "Siehst du etwas der Art {kind}?"),
        "exists_number": ("Sind {number} Dinge auf dem Bild?", "Siehst du {number} Dinge?"),
        "exists_more": ("Sind mehr als {number} Dinge auf dem Bild?", "Siehst du mehr als {number} Dinge?"),
        "exists_place": ("Ist etwas {place}?", "Siehst du etwas {place}?"),
        "category": ("Was für eine Art von Ding ist {place}?", "Welche Art von Ding siehst du {place}?"),
        "name": ("Was ist {place}?", "Was siehst du {place}?", "Nenne das Ding {place}."),
        "what_side": ("Was ist {side} {the}?", "Was siehst du {side} {the}?"),
        "is_side": ("Ist {the} {side} {the_other}?", "Siehst du {the} {side} {the_other}?"),
        "word_category": ("Was für eine Art von Ding ist {a}?", "Welche Art von Ding bezeichnet {a}?"),
        "word_from": ("Was heißt {a} auf Englisch?", "Übersetze {a} ins Englische."),
    },
    small_talk=(
        ("Hallo!", "Hallo! Was möchtest du wissen?"),
        ("Guten Tag, kannst du mir helfen?", "Gerne. Was ist deine Frage?"),
        ("Danke!", "Gern geschehen."),
    ),
)  # fmt: skip
FRENCH = Language(
    tag="fr", yes="oui", no="non", quotes="« {} »",
    rows=("en haut", "au milieu", "en bas"), columns=("à gauche", "au centre", "à droite"),
    places={"center": ("au centre",), "edge": ("{row} au centre",), "side": ("{row} {column}",),
            "corner": ("{row} {column}", "dans le coin {row} {column}")},
    sides={"left": "à gauche de", "right": "à droite de", "above": "au-dessus de", "below": "en dessous de"},
    questions={
        "total": ("Combien d'objets y a-t-il sur l'image ?", "Combien d'objets vois-tu ?", "Compte les objets."),
        "object": ("Combien de fois voit-on {many} sur l'image ?", "Combien de fois vois-tu {many} ?"),
        "exists": ("Voit-on {a} sur l'image ?", "Vois-tu {a} ?", "L'image montre-t-elle {a} ?"),
        "exists_category": ("Voit-on un objet de type {kind} sur l'image ?", "Vois-tu un objet de type {kind} ?"),
        "exists_number": ("Y a-t-il {number} objets sur l'image ?", "Vois-tu {number} objets ?"),
        "exists_more": ("Y a-t-il plus de {number} objets sur l'image ?", "Vois-tu plus de {number} objets ?"),
        "exists_place": ("Y a-t-il quelque chose {place} ?", "Vois-tu quelque chose {place} ?"),
        "category": ("Quel type d'objet voit-on {place} ?", "Quel type d'objet y a-t-il {place} ?"),
        "name": ("Que voit-on {place} ?", "Qu'y a-t-il {place} ?", "Nomme l'objet {place}."),
        "what_side": ("Qu'y a-t-il {side} {the} ?", "Que voit-on {side} {the} ?"),
        "is_side": ("Voit-on {the} {side} {the_other} ?", "Vois-tu {the} {side} {the_other} ?"),
        "word_category": ("Quel type d'objet désigne {a} ?", "De quel type d'objet parle-t-on avec {a} ?"),
        "word_from": ("Comment dit-on {a} en anglais ?", "Traduis {a} en anglais."),
    },
    small_talk=(
        ("Bonjour !", "Bonjour ! Que veux-tu savoir ?"),
        ("Salut, peux-tu m'aider ?", "Bien sûr. Quelle est ta question ?"),
        ("Merci !", "Je t'en prie."),
    ),
)  # fmt: skip
SPANISH = Language(
    tag="es", yes="sí", no="no", quotes="«{}»",
    rows=("arriba", "en el medio", "abajo"), columns=("a la izquierda", "en el centro", "a la derecha"),
    places={"center": ("en el centro",), "edge": ("{row} en el centro",), "side": ("{row} {column}",),
            "corner": ("{row} {column}", "en la esquina de {row} {column}")},
    sides={"left": "a la izquierda de", "right": "a la derecha de", "above": "encima de", "below": "debajo de"},
    questions={
        "total": ("¿Cuántos objetos hay en la imagen?", "¿Cuántos objetos ves?", "Cuenta los objetos."),
        "object": ("¿Cuántas veces se ve {many} en la imagen?", "¿Cuántas veces ves {many}?"),
        "exists": ("¿Se ve {a} en la imagen?", "¿Ves {a}?", "¿La imagen muestra {a}?"),
        "exists_category": ("¿Se ve algo del tipo {kind} en la imagen?", "¿Ves algo del tipo {kind}?"),
        "exists_number": ("¿Hay {number} objetos en la imagen?", "¿Ves {number} objetos?"),
        "exists_more": ("¿Hay más de {number} objetos en la imagen?", "¿Ves más de {number} objetos?"),
        "exists_place": ("¿Hay algo {place}?", "¿Ves algo {place}?"),
        "category": ("¿Qué tipo de objeto hay {place}?", "¿Qué tipo de objeto se ve {place}?"),
        "name": ("¿Qué hay {place}?", "¿Qué se ve {place}?", "Nombra el objeto que está {place}."),
        "what_side": ("¿Qué hay {side} {the}?", "¿Qué se ve {side} {the}?"),
        "is_side": ("¿Se ve {the} {side} {the_other}?", "¿Está {the} {side} {the_other}?"),
        "word_category": ("¿Qué tipo de objeto es {a}?", "¿A qué tipo de objeto se refiere {a}?"),
        "word_from": ("¿Cómo se dice {a} en inglés?", "Traduce {a} al inglés."),
    },
    small_talk=(
        ("¡Hola!", "¡Hola! ¿Qué quieres saber?"),
        ("Buenos días, ¿puedes ayudarme?", "Claro. ¿Cuál es tu pregunta?"),
        ("¡Gracias!", "De nada."),
    ),
)  # fmt: skip
LANGUAGES = {language.tag: language for language in (ENGLISH, GERMAN, FRENCH, SPANISH)}
OTHER_LANGUAGES = ("de", "fr", "es")
"""In the order of the table of categories."""
ENGLISH_NAMES = {"de": "German", "fr": "French", "es": "Spanish"}

CATEGORIES = {
    "animal": ("Tier", "animal", "animal"),
    "bird": ("Vogel", "oiseau", "pájaro"),
    "reptile": ("Reptil", "reptile", "reptil"),
    "sea animal": ("Meerestier", "animal marin", "animal marino"),
    "bug": ("Krabbeltier", "petite bête", "bicho"),
    "plant": ("Pflanze", "plante", "planta"),
    "fruit": ("Obst", "fruit", "fruta"),
    "vegetable": ("Gemüse", "légume", "verdura"),
    "dish": ("Gericht", "plat", "plato"),
    "sweet": ("Süßigkeit", "sucrerie", "dulce"),
    "drink": ("Getränk", "boisson", "bebida"),
    "kitchen item": ("Küchengerät", "ustensile de cuisine", "utensilio de cocina"),
    "place": ("Ort", "lieu", "lugar"),
    "vehicle": ("Fahrzeug", "véhicule", "vehículo"),
    "boat": ("Boot", "bateau", "barco"),
    "aircraft": ("Luftfahrzeug", "aéronef", "aeronave"),
    "sky object": ("Himmelskörper", "astre", "astro"),
    "weather sign": ("Wetterzeichen", "signe météo", "signo del tiempo"),
    "festive item": ("Festartikel", "objet de fête", "objeto de fiesta"),
    "award": ("Auszeichnung", "récompense", "premio"),
    "sports item": ("Sportartikel", "article de sport", "artículo deportivo"),
    "game item": ("Spielzeug", "jeu", "juego"),
    "garment": ("Kleidung", "vêtement", "prenda"),
    "music item": ("Musik", "musique", "música"),
    "device": ("Gerät", "appareil", "aparato"),
    "stationery item": ("Schreibware", "fourniture de bureau", "artículo de oficina"),
    "money item": ("Geld", "argent", "dinero"),
    "tool": ("Werkzeug", "outil", "herramienta"),
    "lab or medical item": ("Labor oder Medizin", "laboratoire ou médecine", "laboratorio o medicina"),
    "household item": ("Haushaltsartikel", "objet ménager", "objeto doméstico"),
    "body part": ("Körperteil", "partie du corps", "parte del cuerpo"),
    "hand sign": ("Handzeichen", "signe de la main", "gesto con la mano"),
    "face": ("Gesicht", "visage", "cara"),
    "person": ("Person", "personne", "persona"),
    "symbol": ("Symbol", "symbole", "símbolo"),
}
"""The lexicon's categories in German, French and Spanish."""

CAPTION_REQUESTS = {
    "names": ("Name the things in the picture.", "List what you see.", "What things are shown?"),
    "raw": ("Give the picture a few keywords.", "Write an alt text.", "Label this picture."),
    "short": ("Describe the image briefly.", "What does the picture show, in one sentence?", "Write a short caption."),
}
"""Instructions by kind of caption."""
