"""Skills that a small student can learn: generated questions, and four teachers with declared strengths and errors.

python -m compact.skills FOLDER        writes training questions, and held-out instances, wordings and tasks
"""
