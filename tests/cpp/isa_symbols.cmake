# Fails unless an object compiled for one instruction set defines its kernel table as its only external symbol, and
# needs nothing from outside but what is listed here.
#     cmake -D NM=nm -D OBJECT=FILE -D TABLE=NAME -P isa_symbols.cmake
#
# The linker may choose a second external or a weak symbol (an inline function, a template) for the whole program,
# which would then run instructions of a newer machine on an older one.

cmake_minimum_required(VERSION 3.24...4.3)

# What the compiler may call on its own, all of it of the C library or its own: GCC 12 zeroes accumulators with memset on
# aarch64 and copies lanes with memcpy without optimization. It then also writes exception tables, which point to
# libstdc++ through a weak pointer that holds no code of ours. Bits of a byte that pieces share are set in one step, on
# aarch64 by functions of libgcc that ask the machine how. The definition takes the errors of products from the C library.
set(allowed_undefined fma fmaf memcpy memset __gxx_personality_v0 __aarch64_cas1_relax __aarch64_ldclr1_relax
    __aarch64_ldset1_relax)
set(allowed_weak DW.ref.__gxx_personality_v0)

execute_process(COMMAND ${NM} --format=posix ${OBJECT} OUTPUT_VARIABLE listing RESULT_VARIABLE code)
if(NOT code EQUAL 0)
  message(FATAL_ERROR "nm must read ${OBJECT}, got exit code ${code}")
endif()

# A line is: name, letter, value, size. W, V, w, v are weak, u is unique, i and I are indirect functions; other
# capitals are external.
set(exported "")
string(STRIP "${listing}" listing)
string(REPLACE "\n" ";" lines "${listing}")
foreach(line IN LISTS lines)
  if(NOT line MATCHES "^([^ ]+) ([A-Za-z])")
    continue()
  endif()
  set(symbol ${CMAKE_MATCH_1})
  set(letter ${CMAKE_MATCH_2})
  if(letter MATCHES "[WVwvuiI]")
    if(symbol IN_LIST allowed_weak)
      continue()
    endif()
    message(SEND_ERROR "${OBJECT} must have no weak symbol, got ${letter} ${symbol}")
  elseif(letter STREQUAL "U")
    if(NOT symbol IN_LIST allowed_undefined)
      message(SEND_ERROR "${OBJECT} must need nothing from outside but ${allowed_undefined}, got ${symbol}")
    endif()
  elseif(letter MATCHES "[A-Z]" AND NOT letter STREQUAL "N")
    list(APPEND exported ${symbol})
  endif()
endforeach()
list(LENGTH exported count)
if(NOT count EQUAL 1 OR NOT exported MATCHES "[0-9]${TABLE}E?$")
  message(SEND_ERROR "${OBJECT} must export exactly ${TABLE}, got ${count}: ${exported}")
endif()
