"""What came in: arrays, options and labels, checked once and brought into one form.

In reading order:

    arrays     what the functions take, number formats, checks of one array
    hints      the error of an argument that a function does not have
    options    what is done to a logit before its softmax, and the options of a function
    labels     ids, probabilities, or probabilities of a few classes
"""
