"""Derivatives of a real loss by each element of its arguments, from values of the loss alone."""

import numpy as np


def each_derivative(loss, arrays, step):
    """[step(f)] for every element of every array, where f moves that one element of that one array."""
    gradients = []
    for position, array in enumerate(arrays):
        gradient = np.empty(array.shape)
        for index in np.ndindex(array.shape):

            def moved(by, position=position, array=array, index=index):
                changed = array.astype(np.result_type(array.dtype, type(by)))
                changed[index] += by
                return loss(*arrays[:position], changed, *arrays[position + 1 :])

            gradient[index] = step(moved)
        gradients.append(gradient)
    return gradients


def complex_step(moved):
    # The formula is analytic: Im f(x + ih) / h is the derivative, with nothing subtracted.
    return moved(1e-200j).imag / 1e-200


def central_difference(moved):
    return (moved(1e-5) - moved(-1e-5)) / 2e-5
