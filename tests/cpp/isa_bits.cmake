# Runs `bits` once for each instruction set that this machine has, and fails unless all print the same.
#     cmake -D BITS=PROGRAM [-D OF=--bench-shapes] [-D EMULATOR=COMMAND] -P isa_bits.cmake
cmake_minimum_required(VERSION 3.24...4.3)

function(run_bits isa result)
  execute_process(COMMAND ${CMAKE_COMMAND} -E env BATCHNORM_ISA=${isa} ${EMULATOR} ${BITS} ${ARGN}
    OUTPUT_VARIABLE text RESULT_VARIABLE code)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "bits must end with 0 on ${isa}, got ${code}: ${text}")
  endif()
  set(${result} "${text}" PARENT_SCOPE)
endfunction()

run_bits("" names --list)
string(STRIP "${names}" names)
string(REPLACE "\n" ";" names "${names}")

# How a tensor is cut for any number of threads is decided above the kernels: every number is tried on the first, and one
# on each of the others, which kernels_test holds to the first piece by piece.
set(threads --threads)
set(expected "")
foreach(isa IN LISTS names)
  run_bits(${isa} text ${OF} ${threads})
  set(threads "")
  if(NOT text MATCHES "^isa ${isa}\n(.+)$")
    message(FATAL_ERROR "bits must run on ${isa}, got: ${text}")
  endif()
  set(hashes "${CMAKE_MATCH_1}")
  if(expected STREQUAL "")
    set(expected "${hashes}")
    list(GET names 0 first)
  endif()
  if(NOT hashes STREQUAL expected)
    string(REPLACE "\n" ";" lines "${hashes}")
    string(REPLACE "\n" ";" expected_lines "${expected}")
    foreach(line wanted IN ZIP_LISTS lines expected_lines)
      if(NOT line STREQUAL wanted)
        message("${first}: ${wanted}\n${isa}: ${line}")
      endif()
    endforeach()
    message(FATAL_ERROR "${isa} must give the bits of ${first}, got the differences above")
  endif()
endforeach()

# The reference sums in another order. It only has to run, with the same bits for any number of threads; not on the
# benchmark's shapes, which are large, and would take as long as all others together.
if(NOT OF)
  run_bits(reference text)
endif()
